"""What the Triton files share. They import without Triton; ``triton`` is None then."""

# mypy: disable-error-code="no-untyped-def"
from __future__ import annotations

import os
from typing import Any

try:
    import triton
    import triton.language as tl
except ImportError:  # no wheels for this platform, or not installed
    triton = tl = None

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


def jit(function: Any = None, **options: Any) -> Any:
    """``triton.jit``, or nothing where there is no Triton."""
    if function is None:
        return lambda function: jit(function, **options)
    return function if triton is None else triton.jit(function, **options)


if INTERPRETED:

    def log2(x):
        return tl.log2(x)

    def reciprocal(x):
        return 1 / x

else:

    @jit
    def log2(x):
        """The GPU's own, where ``tl.log2`` would spend twenty instructions on digits that are not missed."""
        return tl.inline_asm_elementwise("lg2.approx.ftz.f32 $0, $1;", "=f,f", [x], tl.float32, is_pure=True, pack=1)

    @jit
    def reciprocal(x):
        return tl.inline_asm_elementwise("rcp.approx.ftz.f32 $0, $1;", "=f,f", [x], tl.float32, is_pure=True, pack=1)


@jit
def load(row, at, vocab, PARTIAL: tl.constexpr, EVICT: tl.constexpr):
    """Logits in float32, -inf beyond the vocabulary."""
    if PARTIAL:
        x = tl.load(row + at, mask=at < vocab, other=float("-inf"), eviction_policy=EVICT)
    else:
        x = tl.load(row + at, eviction_policy=EVICT)
    wide = x.to(tl.float32)
    if x.dtype == tl.float16:
        wide = tl.where(wide <= -65504.0, float("-inf"), wide)
    return wide


@jit
def largest(x, SUMS: tl.constexpr):
    """Each four neighbours' largest, where there are to be a quarter as many; they are in one thread, which has then
    three registers more."""
    if x.shape[0] != SUMS:
        x = tl.max(tl.reshape(x, [SUMS, 4]), 1)
    return x


@jit
def summed(x, SUMS: tl.constexpr):
    """Likewise their sum."""
    if x.shape[0] != SUMS:
        x = tl.sum(tl.reshape(x, [SUMS, 4]), 1)
    return x


@jit
def three_largest(t, v1, v2, v3, SUMS: tl.constexpr):
    """After ``t``, each lane's two largest values so far, and those among which is the largest of the third largest."""
    v3 = tl.maximum(v3, largest(tl.minimum(v2, t), SUMS))
    v2 = tl.maximum(v2, tl.minimum(v1, t))
    return tl.maximum(v1, t), v2, v3
