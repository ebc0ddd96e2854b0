"""What the Triton kernel does with a block of logits in each of its walks, and whole walks that it does elsewhere.

Names are those of triton.py: ``e_s``, ``e_t`` and ``d`` of its algebra are ``es``, ``et`` and ``d``; ``per_s`` and
``per_t`` are one over their sums, ``ratio`` is ``sum_t / sum_s``.
"""

# mypy: disable-error-code="no-untyped-def"
from __future__ import annotations

from akl_lightning.kernels.triton_common import jit, largest, load, summed, three_largest, tl


@jit
def reference(row, label, vocab, BLOCK: tl.constexpr):
    """A guess at the row's maximum: that of its first block, or the label's logit, which is often it."""
    first = tl.max(load(row, tl.arange(0, BLOCK), vocab, True, ""), 0)
    first = tl.maximum(
        first, tl.load(row + label, mask=(label >= 0) & (label < vocab), other=float("-inf")).to(tl.float32)
    )
    return tl.where(first > -3.37e38, first, 0.0)


@jit
def _difference(s, t):
    """``t - s``; infinite where one of them is masked, be it by the lowest number of its dtype."""
    d = t - s
    return tl.where(tl.abs(d) < 3.37e38, d, d * float("inf"))


@jit
def _sum_up(s, t, s_ref, t_ref, c, ls, lt, lh, fk, rk, s_top, v1, v2, v3, SOFTENED: tl.constexpr, SUMS: tl.constexpr):
    s_top = tl.maximum(s_top, largest(s, SUMS))
    v1, v2, v3 = three_largest(t, v1, v2, v3, SUMS)
    s -= s_ref
    t -= t_ref
    es = tl.exp2(s * c)
    et = tl.exp2(t * c)
    d = _difference(s, t)
    ls += summed(es, SUMS)
    lt += summed(et, SUMS)
    if SOFTENED:
        lh += summed(tl.exp2(s * 1.4426950408889634), SUMS)
    fk += summed(tl.where(et > 0, d, 0.0) * et, SUMS)
    rk += summed(tl.where(es > 0, d, 0.0) * es, SUMS)
    return ls, lt, lh, fk, rk, s_top, v1, v2, v3


@jit
def sums(S, T, vocab, s_ref, t_ref, c, SOFTENED: tl.constexpr, BLOCK: tl.constexpr, SUMS: tl.constexpr):
    lane = tl.arange(0, BLOCK)
    zero = tl.zeros([SUMS], tl.float32)
    lowest = tl.full([BLOCK], float("-inf"), tl.float32)
    ls, lt, lh, fk, rk = zero, zero, zero, zero, zero
    v1, v2 = lowest, lowest
    s_top, v3 = largest(lowest, SUMS), largest(lowest, SUMS)
    blocks = vocab // BLOCK
    if blocks * BLOCK < vocab:
        rest = blocks * BLOCK + lane
        s = load(S, rest, vocab, True, "")
        t = load(T, rest, vocab, True, "")
        ls, lt, lh, fk, rk, s_top, v1, v2, v3 = _sum_up(
            s, t, s_ref, t_ref, c, ls, lt, lh, fk, rk, s_top, v1, v2, v3, SOFTENED, SUMS
        )
    for i in range(0, blocks):
        s = load(S, i * BLOCK + lane, vocab, False, "")
        t = load(T, i * BLOCK + lane, vocab, False, "")
        ls, lt, lh, fk, rk, s_top, v1, v2, v3 = _sum_up(
            s, t, s_ref, t_ref, c, ls, lt, lh, fk, rk, s_top, v1, v2, v3, SOFTENED, SUMS
        )
    return ls, lt, lh, fk, rk, s_top, v1, v2, v3


@jit
def sum_gaps(
    s, t, s_ref, t_ref, c, scale, per_t, per_s, ratio, log_ratio, lo, hi, share, top, a, b,
    total, head, best, value, slope, PAIR: tl.constexpr, SUMS: tl.constexpr,
):  # fmt: skip
    es = tl.exp2((s - s_ref) * c)
    et = tl.exp2((t - t_ref) * c)
    # Not from p and q, whose products a fused multiply-add rounds apart: equal rows have no gap.
    gap = tl.abs(es * ratio - et)  # in units of 1 / sum_t
    if PAIR is not None:
        p = et * per_t
        q = es * per_s
        g, qc = PAIR(((t - t_ref) - (s - s_ref)) * scale - log_ratio, p, q, a, b)
        value += summed(g, SUMS)
        slope += summed(qc, SUMS)
    total += summed(gap, SUMS)
    head += summed(tl.where(t >= hi, gap, tl.where(t >= lo, gap * share, 0.0)), SUMS)
    best = tl.maximum(best, largest(tl.where(t == top, s, float("-inf")), SUMS))
    return total, head, best, value, slope


@jit
def gradient_of(
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


@jit
def slope_without_masked(s_row, t_row, vocab, s_ref, t_ref, c, BLOCK: tl.constexpr):
    """``Σ e_s d`` where the teacher is not masked, and ``Σ e_s`` where it is."""
    rk = tl.zeros([BLOCK], tl.float32)
    masked = tl.zeros([BLOCK], tl.float32)
    for start in range(0, vocab, BLOCK):
        s = load(s_row, start + tl.arange(0, BLOCK), vocab, True, "")
        t = load(t_row, start + tl.arange(0, BLOCK), vocab, True, "")
        es = tl.exp2((s - s_ref) * c)
        d = _difference(s - s_ref, t - t_ref)
        counts = (es > 0) & (d > float("-inf"))
        rk += tl.where(counts, d, 0.0) * es
        masked += tl.where(counts, 0.0, es)
    return tl.sum(rk, 0), tl.sum(masked, 0)
