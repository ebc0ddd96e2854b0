"""The comparison as a Triton kernel: one program per token, three walks over its row, nothing waits for the host.

With logits ``s`` and ``t``, references ``S`` and ``T`` near their maxima, ``e_s = exp(s - S)``, ``e_t = exp(t - T)``
and ``d = (t - T) - (s - S)``, all at the temperature:

1. ``l_s = Σ e_s``, ``l_t = Σ e_t``, ``FKL = Σ e_t d / l_t - log(l_t / l_s)``, ``RKL = log(l_t / l_s) - Σ e_s d / l_s``:
   no difference of large numbers, so that a student near its teacher keeps its digits. The references are guesses;
   where they turn out far from the row's maxima, the walk is done again with those. Each lane keeps its three largest
   teacher logits. The head's crossing value is then searched among the first and second of each lane; the third tells
   whether a lane may hold more of the head than two, and only then is the row itself searched.
2. ``Σ abs(p - q)`` over the row and over the head, and what a divergence sums up over the row (``g`` and ``q c``).
3. The gradient, ``q c - q Σ q c`` and that of cross entropy. A block is read before it is written: it may replace the
   student's logits.

The second walk runs backwards: what the first has read last is what the cache still holds.
"""

# mypy: disable-error-code="no-untyped-def"
from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from akl_lightning.kernels.pairs import Comparison

try:
    import triton
    import triton.language as tl
except ImportError:  # no wheels for this platform, or not installed: supports() says so
    triton = None

STATISTICS = (
    "loss", "divergence", "cross_entropy", "fkl", "rkl", "head_gap", "tail_gap", "head_weight", "top1_agreement",
)  # fmt: skip
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


class Launch(NamedTuple):
    """How the work is laid out on the multiprocessors; none of it changes the result beyond rounding."""

    block: int
    warps: int
    stages: int = 1
    unroll: int = 1
    backwards: bool = True
    registers: int | None = None
    keep: str = "evict_last"


def supports(student: Tensor, teacher: Tensor | None) -> bool:
    """Whether the kernel takes these logits: Triton and a GPU that it knows, or its interpreter."""
    if triton is None or not all(
        x.dtype in _DTYPES and x.stride(1) == 1 and x.shape[1] < 2**30 for x in (student, teacher) if x is not None
    ):
        return False
    if os.environ.get("TRITON_INTERPRET") == "1":
        return True
    return student.is_cuda and torch.version.hip is None and torch.cuda.get_device_capability(student.device) >= (8, 0)


def compare(
    student: Tensor,
    teacher: Tensor | None,
    labels: Tensor,
    how: Comparison,
    gradient: Tensor | None = None,
    launch: Launch | None = None,
) -> dict[str, Tensor]:
    """Compare student and teacher row by row.

    Args:
        student: logits ``[rows, vocab]`` in float32, bfloat16 or float16, unit stride along the vocabulary.
        teacher: likewise, or None: then ``loss`` and ``cross_entropy`` alone come back.
        labels: ``[rows]``, int64.
        how: the divergence and its settings.
        gradient: gets the gradient of the summed loss, ``[rows, vocab]``; it may be ``student``.
        launch: how the work is laid out; chosen by the vocabulary where it is None.

    Returns:
        ``[rows]`` in float32 for each name of :data:`akl_lightning.criterion.STATISTICS`.
    """
    rows, vocab = student.shape
    out = torch.empty(len(STATISTICS) if teacher is not None else 2, rows, device=student.device)
    names = STATISTICS if teacher is not None else ("loss", "cross_entropy")
    if rows:
        divergence, a, b, adaptive = _divergence(how)
        layout = launch or _launch(vocab, divergence if teacher is not None else None)
        into = student if gradient is None else gradient
        options = {
            "GRADIENT": gradient is not None, "BLOCK": layout.block, "STAGES": layout.stages, "UNROLL": layout.unroll,
            "KEEP": layout.keep, "num_warps": layout.warps, "maxnreg": layout.registers, "enable_fp_fusion": True,
        }  # fmt: skip
        if teacher is None:
            _cross_entropy[(rows,)](
                student, into, labels, out, vocab, rows, student.stride(0), into.stride(0), **options
            )
        else:
            _compare[(rows,)](
                student, teacher, into, labels, out, vocab, rows,
                student.stride(0), teacher.stride(0), into.stride(0),
                how.alpha, how.temperature, _goal(how), int(how.head_rule == "within"), a, b, adaptive,
                PAIR=divergence, SOFTENED=how.temperature != 1, BACKWARDS=layout.backwards, **options,
            )  # fmt: skip
    return dict(zip(names, out.unbind(), strict=True))


def _launch(vocab: int, pair: Any) -> Launch:
    """Sixty-four registers a thread fill a multiprocessor; what a pair needs beyond them is two elements a thread."""
    if vocab <= 1024:
        return Launch(max(64, triton.next_power_of_2(vocab)), 4)
    if pair is not None:
        return Launch(2048, 32)
    return Launch(4096, 32) if vocab > 65536 else Launch(2048, 16, registers=64)


def _goal(how: Comparison) -> float:
    """The share of the teacher's mass at which the head's crossing value is reached; 2 where every token belongs."""
    if how.mu == 1:
        return 2.0
    return how.mu * (1 - 1e-6 if how.head_rule == "cover" else 1 + 1e-6)


def _divergence(how: Comparison) -> tuple[Any, float, float, int]:
    """The pair, its two numbers and whether these are AKL's weights; a pair of None is ``a FKL + b RKL``."""
    if how.pair == "skew_forward_kl" and how.constant == 0:
        return None, 1.0, 0.0, 0
    if how.pair == "skew_reverse_kl" and how.constant == 0:
        return None, 0.0, 1.0, 0
    if how.pair in PAIRS:
        return PAIRS[how.pair], how.constant, 1 - how.constant, 0
    weights = {None: (0.0, 0.0), "forward_kl": (1.0, 0.0), "reverse_kl": (0.0, 1.0), "adaptive_kl": (0.0, 0.0)}
    a, b = weights.get(how.pair, (how.constant, 1 - how.constant))
    return None, a, b, int(how.pair == "adaptive_kl")


def _jit(function: Any = None, **options: Any) -> Any:
    if function is None:
        return lambda function: _jit(function, **options)
    return function if triton is None else triton.jit(function, **options)


# --------------------------------------------------------------------------------------------------------------------
# The pairs, as in pairs.py, but from r = log p - log q, which keeps the digits of a student near its teacher


if os.environ.get("TRITON_INTERPRET") == "1":

    def _log2(x):
        return tl.log2(x)

    def _reciprocal(x):
        return 1 / x

else:

    @_jit
    def _log2(x):
        """The GPU's own, where ``tl.log2`` would spend twenty instructions on digits that are not missed."""
        return tl.inline_asm_elementwise("lg2.approx.ftz.f32 $0, $1;", "=f,f", [x], tl.float32, is_pure=True, pack=1)

    @_jit
    def _reciprocal(x):
        return tl.inline_asm_elementwise("rcp.approx.ftz.f32 $0, $1;", "=f,f", [x], tl.float32, is_pure=True, pack=1)


@_jit
def _expm1(x):
    series = x * (1 + x * (0.5 + x * (0.16666667 + x * 0.041666667)))
    return tl.where(tl.abs(x) < 0.0625, series, tl.exp2(x * 1.4426950408889634) - 1)


@_jit
def _log1p(x):
    z = x * _reciprocal(2 + x)
    zz = z * z
    series = z * (2 + zz * (0.6666667 + zz * (0.4 + zz * 0.2857143)))
    return tl.where(tl.abs(x) < 0.25, series, _log2(1 + x) * 0.6931471805599453)


@_jit
def _bounded(r):
    """Beyond e⁸⁰ the smaller of p and q counts nothing; NaN, where both are 0, becomes a number."""
    return tl.minimum(tl.maximum(r, -80.0), 80.0)


@_jit
def jensen_shannon(r, p, q, a, b):
    r = _bounded(r)
    log_m_over_q = _log1p(a * _expm1(r))
    reverse = -b * q * log_m_over_q
    return a * p * (r - log_m_over_q) + reverse, reverse


@_jit
def skew_forward_kl(r, p, q, a, b):
    x = b * _expm1(-_bounded(r))
    # q c + b q: a slope of -b is nothing but a constant, and without it there are digits near the teacher.
    return -p * _log1p(x), b * q * (x * _reciprocal(1 + x))


@_jit
def skew_reverse_kl(r, p, q, a, b):
    x = b * _expm1(_bounded(r))
    log_m_over_q = _log1p(x)
    return -q * log_m_over_q, q * (a * (x * _reciprocal(1 + x)) - log_m_over_q)


@_jit
def total_variation(r, p, q, a, b):
    return tl.abs(p - q) * 0.5, tl.where(r > 0, -0.5 * q, tl.where(r < 0, 0.5 * q, 0.0))


PAIRS: dict[str | None, Callable[..., Any]] = {
    "jensen_shannon": jensen_shannon,
    "skew_forward_kl": skew_forward_kl,
    "skew_reverse_kl": skew_reverse_kl,
    "total_variation": total_variation,
}
"""Every pair but those of ``a FKL + b RKL``: ``(r, p, q, a, b)`` to ``g`` and ``q c``, with ``a`` the divergence's
constant and ``b = 1 - a``. ``r`` may be infinite, or NaN where ``p = q = 0``; a slope may lack a constant that all
tokens share."""


# --------------------------------------------------------------------------------------------------------------------
# The kernel


@_jit
def _load(row, at, vocab, PARTIAL: tl.constexpr, KEEP: tl.constexpr):
    if PARTIAL:
        x = tl.load(row + at, mask=at < vocab, other=float("-inf"), eviction_policy=KEEP)
    else:
        x = tl.load(row + at, eviction_policy=KEEP)
    wide = x.to(tl.float32)
    if x.dtype == tl.float16:
        wide = tl.where(wide <= -65504.0, float("-inf"), wide)
    return wide


@_jit
def _reference(row, label, vocab, BLOCK: tl.constexpr):
    """A guess at the row's maximum: that of its first block, or the label's logit, which is often it."""
    first = tl.max(_load(row, tl.arange(0, BLOCK), vocab, True, "evict_last"), 0)
    first = tl.maximum(
        first, tl.load(row + label, mask=(label >= 0) & (label < vocab), other=float("-inf")).to(tl.float32)
    )
    return tl.where(first > -3.37e38, first, 0.0)


@_jit
def _difference(s, t):
    """``t - s``; infinite where one of them is masked, be it by the lowest number of its dtype."""
    d = t - s
    return tl.where(tl.abs(d) < 3.37e38, d, d * float("inf"))


@_jit
def _sum_up(s, t, s_ref, t_ref, c, ls, lt, lh, fk, rk, s_top, v1, v2, v3, SOFTENED: tl.constexpr):
    s_top = tl.maximum(s_top, s)
    v3 = tl.maximum(v3, tl.minimum(v2, t))
    v2 = tl.maximum(v2, tl.minimum(v1, t))
    v1 = tl.maximum(v1, t)
    s -= s_ref
    t -= t_ref
    es = tl.exp2(s * c)
    et = tl.exp2(t * c)
    d = _difference(s, t)
    ls += es
    lt += et
    if SOFTENED:
        lh += tl.exp2(s * 1.4426950408889634)
    fk += tl.where(et > 0, d, 0.0) * et
    rk += tl.where(es > 0, d, 0.0) * es
    return ls, lt, lh, fk, rk, s_top, v1, v2, v3


@_jit
def _sum_gaps(
    s, t, s_ref, t_ref, c, scale, per_t, per_s, ratio, log_ratio, lo, hi, top, a, b,
    total, from_lo, from_hi, best, value, slope, PAIR: tl.constexpr,
):  # fmt: skip
    es = tl.exp2((s - s_ref) * c)
    et = tl.exp2((t - t_ref) * c)
    gap = tl.abs(es * ratio - et)
    total += gap
    from_lo += tl.where(t >= lo, gap, 0.0)
    from_hi += tl.where(t >= hi, gap, 0.0)
    best = tl.maximum(best, tl.where(t == top, s, float("-inf")))
    if PAIR is not None:
        r = ((t - t_ref) - (s - s_ref)) * scale - log_ratio
        g, qc = PAIR(r, et * per_t, es * per_s, a, b)
        value += g
        slope += qc
    return total, from_lo, from_hi, best, value, slope


@_jit
def _gradient(
    s, t, at_label, s_ref, t_ref, c, scale, per_t, per_s, ratio, log_ratio, of_q, of_qr, of_apart, soft, of_h, hard,
    a, b, PAIR: tl.constexpr, SOFTENED: tl.constexpr,
):  # fmt: skip
    es = tl.exp2((s - s_ref) * c)
    et = tl.exp2((t - t_ref) * c)
    r = ((t - t_ref) - (s - s_ref)) * scale - log_ratio
    if PAIR is None:
        g = (es * ratio - et) * of_apart
        # A masked student has q = 0, which must not meet infinity. Dropping a masked teacher is a slope of -1.
        r = tl.where(r > -1e37, tl.minimum(r, 1e37), 1.0)
        g += es * (of_q + of_qr * r)
    else:
        _, qc = PAIR(r, et * per_t, es * per_s, a, b)
        g = qc * soft + es * of_q
    if SOFTENED:
        g += tl.exp2((s - s_ref) * 1.4426950408889634) * of_h
    return g - tl.where(at_label, hard, 0.0)


@_jit
def _next(x):
    """The next larger float."""
    bits = x.to(tl.int32, bitcast=True)
    bits = tl.where(bits >= 0, bits + 1, bits - 1)
    return tl.where(x == 0, 1e-45, bits.to(tl.float32, bitcast=True))


@_jit
def _mass(v1, v2, t_ref, c, cut):
    e1 = tl.where(v1 >= cut, tl.exp2((v1 - t_ref) * c), 0.0)
    return tl.sum(e1 + tl.where(v2 >= cut, tl.exp2((v2 - t_ref) * c), 0.0), 0)


@_jit
def _masses_of_row(row, vocab, t_ref, c, x1, x2, x3, BLOCK: tl.constexpr):
    m1 = tl.zeros([BLOCK], tl.float32)
    m2 = tl.zeros([BLOCK], tl.float32)
    m3 = tl.zeros([BLOCK], tl.float32)
    for start in range(0, vocab, BLOCK):
        t = _load(row, start + tl.arange(0, BLOCK), vocab, True, "evict_last")
        e = tl.exp2((t - t_ref) * c)
        m1 += tl.where(t >= x1, e, 0.0)
        m2 += tl.where(t >= x2, e, 0.0)
        m3 += tl.where(t >= x3, e, 0.0)
    return tl.sum(m1, 0), tl.sum(m2, 0), tl.sum(m3, 0)


@_jit
def _narrow(lo, hi, above, from_lo, x1, x2, x3, m1, m2, m3, t_ref, c, target):
    """One step of a search: bounds, the masses above and from the lower one on, and whether to go on."""
    lo = tl.where(m3 >= target, x3, tl.where(m2 >= target, x2, tl.where(m1 >= target, x1, lo)))
    hi = tl.where(m3 >= target, hi, tl.where(m2 >= target, x3, tl.where(m1 >= target, x2, x1)))
    from_lo = tl.where(m3 >= target, m3, tl.where(m2 >= target, m2, tl.where(m1 >= target, m1, from_lo)))
    above = tl.where(m3 >= target, above, tl.where(m2 >= target, m3, tl.where(m1 >= target, m2, m1)))
    middle = lo + 0.5 * (hi - lo)
    # Two tokens weigh twice the lower bound at least. Values so near each other that p is the same are one value.
    several = from_lo - above > 1.5 * tl.exp2((lo - t_ref) * c)
    return lo, hi, above, from_lo, several & (middle > lo) & (middle < hi) & ((hi - lo) * c > 1e-8)


@_jit
def _crossing(row, vocab, v1, v2, top, third, t_ref, c, total, target, BLOCK: tl.constexpr):
    """The bounds ``[lo, hi)`` of the crossing value, the mass above them and the mass within.

    They hold the tokens of one value alone. Mass counts in units of ``exp(T)``.
    """
    beyond = _next(third)  # every token from here on is among v1 and v2
    # All that lies below this bound weighs less than what the head leaves out.
    floor = t_ref + tl.log2((total - target) / vocab) / c - 0.001
    lo = top
    hi = _next(top)
    above = 0.0
    from_lo = _mass(v1, v2, t_ref, c, top)
    in_row = (beyond > top) | (_mass(v1, v2, t_ref, c, floor) < target)
    if target >= total:
        lo = -3.37e38
        hi = lo
        above = total
        from_lo = total
        in_row = False
    elif (from_lo < target) & (not in_row):
        above = from_lo
        hi = top
        lo = floor
        from_lo = total
        going = True
        while going:
            x1 = lo + 0.25 * (hi - lo)
            x2 = lo + 0.5 * (hi - lo)
            x3 = lo + 0.75 * (hi - lo)
            m1 = _mass(v1, v2, t_ref, c, x1)
            m2 = _mass(v1, v2, t_ref, c, x2)
            m3 = _mass(v1, v2, t_ref, c, x3)
            lo, hi, above, from_lo, going = _narrow(lo, hi, above, from_lo, x1, x2, x3, m1, m2, m3, t_ref, c, target)
        if lo < beyond:
            mass = _mass(v1, v2, t_ref, c, beyond)
            in_row = mass < target
            if not in_row:
                lo = beyond
                from_lo = mass
    if in_row:
        lo = tl.minimum(floor, third)
        hi = beyond
        above = _mass(v1, v2, t_ref, c, beyond)
        from_lo = total
        going = True
        while going:
            x1 = lo + 0.25 * (hi - lo)
            x2 = lo + 0.5 * (hi - lo)
            x3 = lo + 0.75 * (hi - lo)
            m1, m2, m3 = _masses_of_row(row, vocab, t_ref, c, x1, x2, x3, BLOCK)
            lo, hi, above, from_lo, going = _narrow(lo, hi, above, from_lo, x1, x2, x3, m1, m2, m3, t_ref, c, target)
    return lo, hi, above, from_lo - above


@_jit
def _slope_without_masked(s_row, t_row, vocab, s_ref, t_ref, c, BLOCK: tl.constexpr):
    """``Σ e_s d`` where the teacher is not masked, and ``Σ e_s`` where it is."""
    rk = tl.zeros([BLOCK], tl.float32)
    masked = tl.zeros([BLOCK], tl.float32)
    for start in range(0, vocab, BLOCK):
        s = _load(s_row, start + tl.arange(0, BLOCK), vocab, True, "evict_last")
        t = _load(t_row, start + tl.arange(0, BLOCK), vocab, True, "evict_last")
        es = tl.exp2((s - s_ref) * c)
        d = _difference(s - s_ref, t - t_ref)
        counts = (es > 0) & (d > float("-inf"))
        rk += tl.where(counts, d, 0.0) * es
        masked += tl.where(counts, 0.0, es)
    return tl.sum(rk, 0), tl.sum(masked, 0)


@_jit(do_not_specialize=["vocab", "rows", "within", "adaptive"])
def _compare(
    S, T, G, LABELS, OUT, vocab, rows, s_stride, t_stride, g_stride,
    alpha, temperature, goal, within, a, b, adaptive,
    PAIR: tl.constexpr, SOFTENED: tl.constexpr, GRADIENT: tl.constexpr,
    BLOCK: tl.constexpr, STAGES: tl.constexpr, UNROLL: tl.constexpr, BACKWARDS: tl.constexpr, KEEP: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    S += row * s_stride
    T += row * t_stride
    lane = tl.arange(0, BLOCK)
    blocks = vocab // BLOCK
    c = 1.4426950408889634 / temperature
    scale = 1 / temperature

    label = tl.load(LABELS + row).to(tl.int32)
    s_ref = _reference(S, label, vocab, BLOCK)
    t_ref = _reference(T, label, vocab, BLOCK)
    ls = tl.zeros([BLOCK], tl.float32)
    lt = tl.zeros([BLOCK], tl.float32)
    lh = tl.zeros([BLOCK], tl.float32)
    fk = tl.zeros([BLOCK], tl.float32)
    rk = tl.zeros([BLOCK], tl.float32)
    s_top = tl.full([BLOCK], float("-inf"), tl.float32)
    v1 = tl.full([BLOCK], float("-inf"), tl.float32)
    v2 = tl.full([BLOCK], float("-inf"), tl.float32)
    v3 = tl.full([BLOCK], float("-inf"), tl.float32)
    if blocks * BLOCK < vocab:
        rest = blocks * BLOCK + lane
        s = _load(S, rest, vocab, True, KEEP)
        t = _load(T, rest, vocab, True, KEEP)
        ls, lt, lh, fk, rk, s_top, v1, v2, v3 = _sum_up(
            s, t, s_ref, t_ref, c, ls, lt, lh, fk, rk, s_top, v1, v2, v3, SOFTENED
        )
    for i in tl.range(0, blocks, num_stages=STAGES, loop_unroll_factor=UNROLL):
        s = _load(S, i * BLOCK + lane, vocab, False, KEEP)
        t = _load(T, i * BLOCK + lane, vocab, False, KEEP)
        ls, lt, lh, fk, rk, s_top, v1, v2, v3 = _sum_up(
            s, t, s_ref, t_ref, c, ls, lt, lh, fk, rk, s_top, v1, v2, v3, SOFTENED
        )
    s_max = tl.max(s_top, 0)
    t_max = tl.max(v1, 0)
    far = tl.maximum(tl.abs(s_max - s_ref), tl.abs(t_max - t_ref)) * tl.maximum(c, 1.4426950408889634)
    if far > 16:  # exp would overflow, or its argument be rounded where it counts most
        s_ref = s_max
        t_ref = t_max
        ls = tl.zeros([BLOCK], tl.float32)
        lt = tl.zeros([BLOCK], tl.float32)
        lh = tl.zeros([BLOCK], tl.float32)
        fk = tl.zeros([BLOCK], tl.float32)
        rk = tl.zeros([BLOCK], tl.float32)
        s_top = tl.full([BLOCK], float("-inf"), tl.float32)
        v1 = tl.full([BLOCK], float("-inf"), tl.float32)
        v2 = tl.full([BLOCK], float("-inf"), tl.float32)
        v3 = tl.full([BLOCK], float("-inf"), tl.float32)
        for start in range(0, vocab, BLOCK):
            s = _load(S, start + lane, vocab, True, KEEP)
            t = _load(T, start + lane, vocab, True, KEEP)
            ls, lt, lh, fk, rk, s_top, v1, v2, v3 = _sum_up(
                s, t, s_ref, t_ref, c, ls, lt, lh, fk, rk, s_top, v1, v2, v3, SOFTENED
            )
    sum_s = tl.sum(ls, 0)
    sum_t = tl.sum(lt, 0)
    third = tl.max(v3, 0)
    per_s = 1 / sum_s
    per_t = 1 / sum_t
    ratio = sum_t * per_s
    log_ratio = tl.log(ratio)
    sum_rk = tl.sum(rk, 0)
    fkl = tl.sum(fk, 0) * per_t / temperature - log_ratio
    rkl = log_ratio - sum_rk * per_s / temperature
    per_h = per_s
    label = tl.load(LABELS + row).to(tl.int32)
    of_label = tl.load(S + label, mask=(label >= 0) & (label < vocab), other=float("nan")).to(tl.float32)
    cross_entropy = s_ref - of_label + tl.log(sum_s)
    if SOFTENED:
        sum_h = tl.sum(lh, 0)
        per_h = 1 / sum_h
        cross_entropy = s_ref - of_label + tl.log(sum_h)

    target = goal * sum_t
    lo, hi, above, inside = _crossing(T, vocab, v1, v2, t_max, third, t_ref, c, sum_t, target, BLOCK)
    # How many tokens tie at the crossing, and how many of them the head needs, or holds.
    ties = tl.maximum(tl.floor(inside / tl.exp2((lo - t_ref) * c) + 0.499), 1.0)
    missing = (target - above) / (inside / ties)
    if within:
        held = tl.minimum(tl.maximum(tl.floor(missing), tl.where(hi > t_max, 1.0, 0.0)), ties)
    else:
        held = tl.minimum(tl.maximum(tl.ceil(missing), 1.0), ties)
    share = tl.where(inside > 0, held / ties, 0.0)

    total = tl.zeros([BLOCK], tl.float32)
    from_lo = tl.zeros([BLOCK], tl.float32)
    from_hi = tl.zeros([BLOCK], tl.float32)
    best = tl.full([BLOCK], float("-inf"), tl.float32)
    value = tl.zeros([BLOCK], tl.float32)
    slopes = tl.zeros([BLOCK], tl.float32)
    if blocks * BLOCK < vocab:
        rest = blocks * BLOCK + lane
        s = _load(S, rest, vocab, True, KEEP)
        t = _load(T, rest, vocab, True, KEEP)
        total, from_lo, from_hi, best, value, slopes = _sum_gaps(
            s, t, s_ref, t_ref, c, scale, per_t, per_s, ratio, log_ratio, lo, hi, t_max, a, b,
            total, from_lo, from_hi, best, value, slopes, PAIR,
        )  # fmt: skip
    for i in tl.range(0, blocks, num_stages=STAGES, loop_unroll_factor=UNROLL):
        block = i
        if BACKWARDS:
            block = blocks - 1 - i
        s = _load(S, block * BLOCK + lane, vocab, False, KEEP)
        t = _load(T, block * BLOCK + lane, vocab, False, KEEP)
        total, from_lo, from_hi, best, value, slopes = _sum_gaps(
            s, t, s_ref, t_ref, c, scale, per_t, per_s, ratio, log_ratio, lo, hi, t_max, a, b,
            total, from_lo, from_hi, best, value, slopes, PAIR,
        )  # fmt: skip
    gap = tl.sum(total, 0) * per_t
    at_hi = tl.sum(from_hi, 0) * per_t
    head_gap = at_hi + (tl.sum(from_lo, 0) * per_t - at_hi) * share
    tail_gap = tl.where(gap - head_gap < 0, 0.0, gap - head_gap)
    gap = head_gap + tail_gap
    # Unequal to 0, not above it: NaN has to stay NaN, so that it is noticed.
    weight = tl.where(gap != 0, head_gap / tl.maximum(gap, 1.2e-38), 0.5)
    if PAIR is None:
        if adaptive:
            a = tl.where(gap != 0, weight, 0.0)
            b = tl.where(gap != 0, 1 - weight, 0.0)
        divergence = tl.where(a == 0, 0.0, a * fkl) + tl.where(b == 0, 0.0, b * rkl)
        slope_of_rkl = rkl
        if rkl == float("inf"):
            finite, masked = _slope_without_masked(S, T, vocab, s_ref, t_ref, c, BLOCK)
            slope_of_rkl = log_ratio * (1 - masked * per_s) - finite * per_s / temperature - masked * per_s
        slope = b * slope_of_rkl
    else:
        divergence = tl.sum(value, 0)
        slope = tl.sum(slopes, 0)
    divergence *= temperature * temperature
    agrees = tl.where(tl.max(best, 0) == s_max, 1.0, 0.0)
    OUT += row
    tl.store(
        OUT, tl.where(alpha == 0, 0.0, alpha * divergence) + tl.where(alpha == 1, 0.0, (1 - alpha) * cross_entropy)
    )
    tl.store(OUT + rows, divergence)
    tl.store(OUT + 2 * rows, cross_entropy)
    tl.store(OUT + 3 * rows, fkl)
    tl.store(OUT + 4 * rows, rkl)
    tl.store(OUT + 5 * rows, head_gap)
    tl.store(OUT + 6 * rows, tail_gap)
    tl.store(OUT + 7 * rows, weight)
    tl.store(OUT + 8 * rows, agrees)

    if GRADIENT:
        # The gradient is es (of_q + of_qr r) + of_apart (es ratio - et), or of a pair, and minus hard at the label.
        G += row * g_stride
        label = tl.load(LABELS + row).to(tl.int32)
        soft = alpha * temperature
        hard = 1 - alpha
        of_q = -soft * slope
        if not SOFTENED:
            of_q += hard
        of_q *= per_s
        of_qr = -soft * b * per_s
        of_apart = soft * a * per_t
        of_h = hard * per_h
        if blocks * BLOCK < vocab:
            rest = blocks * BLOCK + lane
            s = _load(S, rest, vocab, True, "evict_first")
            t = _load(T, rest, vocab, True, "evict_first")
            g = _gradient(
                s, t, rest == label, s_ref, t_ref, c, scale, per_t, per_s, ratio, log_ratio,
                of_q, of_qr, of_apart, soft, of_h, hard, a, b, PAIR, SOFTENED,
            )  # fmt: skip
            tl.store(G + rest, g.to(G.dtype.element_ty), mask=rest < vocab)
        for i in tl.range(0, blocks, num_stages=STAGES, loop_unroll_factor=UNROLL):
            s = _load(S, i * BLOCK + lane, vocab, False, "evict_first")
            t = _load(T, i * BLOCK + lane, vocab, False, "evict_first")
            g = _gradient(
                s, t, lane == label - i * BLOCK, s_ref, t_ref, c, scale, per_t, per_s, ratio, log_ratio,
                of_q, of_qr, of_apart, soft, of_h, hard, a, b, PAIR, SOFTENED,
            )  # fmt: skip
            tl.store(G + (i * BLOCK + lane), g.to(G.dtype.element_ty))


@_jit(do_not_specialize=["vocab", "rows"])
def _cross_entropy(
    S, G, LABELS, OUT, vocab, rows, s_stride, g_stride,
    GRADIENT: tl.constexpr, BLOCK: tl.constexpr, STAGES: tl.constexpr, UNROLL: tl.constexpr, KEEP: tl.constexpr,
):  # fmt: skip
    """Supervised fine-tuning: no teacher, two walks."""
    row = tl.program_id(0).to(tl.int64)
    S += row * s_stride
    lane = tl.arange(0, BLOCK)
    label = tl.load(LABELS + row).to(tl.int32)
    of_label = tl.load(S + label, mask=(label >= 0) & (label < vocab), other=float("nan")).to(tl.float32)
    blocks = vocab // BLOCK
    rest = blocks * BLOCK + lane
    top = tl.full([BLOCK], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK], tl.float32)
    ref = _reference(S, label, vocab, BLOCK)
    walks = 0
    while walks < 2:
        for i in tl.range(0, blocks, num_stages=STAGES, loop_unroll_factor=UNROLL):
            s = _load(S, i * BLOCK + lane, vocab, False, KEEP)
            total += tl.exp2((s - ref) * 1.4426950408889634)
            top = tl.maximum(top, s)
        if blocks * BLOCK < vocab:
            s = _load(S, rest, vocab, True, KEEP)
            total += tl.exp2((s - ref) * 1.4426950408889634)
            top = tl.maximum(top, s)
        largest = tl.max(top, 0)
        walks = tl.where(tl.abs(largest - ref) > 11, walks + 1, 2)
        if walks == 1:
            ref = largest
            total = tl.zeros([BLOCK], tl.float32)
    mass = tl.sum(total, 0)
    cross_entropy = ref - of_label + tl.log(mass)
    tl.store(OUT + row, cross_entropy)
    tl.store(OUT + rows + row, cross_entropy)
    if GRADIENT:
        G += row * g_stride
        per = 1 / mass
        for start in range(0, vocab, BLOCK):
            at = start + lane
            s = _load(S, at, vocab, True, "evict_first")
            g = tl.exp2((s - ref) * 1.4426950408889634) * per - tl.where(at == label, 1.0, 0.0)
            tl.store(G + at, g.to(G.dtype.element_ty), mask=at < vocab)
