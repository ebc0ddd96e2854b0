"""Where the head ends: the search for the teacher logit at which the mass from the largest on reaches ``mu``.

Nothing is sorted. Each lane has kept its two largest values in registers, and a bound tells from where on these are all
there are; mostly the head ends above it, and the search costs no walk over the row. Where a lane held too many (a flat
row, a temperature, ``mu`` near 1, equals), walks over the row narrow the interval until few tokens are missing, and the
lanes collect again, below what is settled. Mass counts in units of ``exp(t_ref)``.
"""

# mypy: disable-error-code="no-untyped-def"
from __future__ import annotations

from akl_lightning.kernels.triton_common import jit, load, three_largest, tl


@jit
def _next(x):
    """The next larger float."""
    bits = x.to(tl.int32, bitcast=True)
    bits = tl.where(bits >= 0, bits + 1, bits - 1)
    return tl.where(x == 0, 1e-45, bits.to(tl.float32, bitcast=True))


@jit
def _mass(v1, v2, t_ref, c, cut):
    e1 = tl.where(v1 >= cut, tl.exp2((v1 - t_ref) * c), 0.0)
    return tl.sum(e1 + tl.where(v2 >= cut, tl.exp2((v2 - t_ref) * c), 0.0), 0)


@jit
def _masses_of_row(row, vocab, t_ref, c, x1, x2, x3, BLOCK: tl.constexpr):
    m1 = tl.zeros([BLOCK], tl.float32)
    m2 = tl.zeros([BLOCK], tl.float32)
    m3 = tl.zeros([BLOCK], tl.float32)
    for start in range(0, vocab, BLOCK):
        t = load(row, start + tl.arange(0, BLOCK), vocab, True, "")
        e = tl.exp2((t - t_ref) * c)
        m1 += tl.where(t >= x1, e, 0.0)
        m2 += tl.where(t >= x2, e, 0.0)
        m3 += tl.where(t >= x3, e, 0.0)
    return tl.sum(m1, 0), tl.sum(m2, 0), tl.sum(m3, 0)


@jit
def _largest_below(row, vocab, bound, BLOCK: tl.constexpr, SUMS: tl.constexpr):
    """Each lane's two largest values below the bound, and the largest third."""
    v1 = tl.full([BLOCK], float("-inf"), tl.float32)
    v2 = tl.full([BLOCK], float("-inf"), tl.float32)
    v3 = tl.full([SUMS], float("-inf"), tl.float32)
    for start in range(0, vocab, BLOCK):
        t = load(row, start + tl.arange(0, BLOCK), vocab, True, "")
        v1, v2, v3 = three_largest(tl.where(t < bound, t, float("-inf")), v1, v2, v3, SUMS)
    return v1, v2, tl.max(v3, 0)


@jit
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


@jit
def crossing(row, vocab, v1, v2, top, third, t_ref, c, total, target, BLOCK: tl.constexpr, SUMS: tl.constexpr):
    """The bounds ``[lo, hi)`` of the crossing value, which hold the tokens of this value alone.

    Args:
        row: of the teacher's logits.
        vocab: its length.
        v1, v2: each lane's largest and second largest logit.
        top, third: the largest of the largest, and of the third largest.
        t_ref, c: a logit ``t`` has the mass ``exp2((t - t_ref) * c)``.
        total: the mass of the row.
        target: what the head is to reach.
        BLOCK: the number of lanes.
        SUMS: of how many parts sums over lanes are.

    Returns:
        ``lo``, ``hi``, the mass from ``hi`` on, and the mass within.
    """
    lo = top
    hi = _next(top)
    above = 0.0
    from_lo = _mass(v1, v2, t_ref, c, top)
    searching = (third >= top) | (from_lo < target)
    if target >= total:
        lo = -3.37e38
        hi = lo
        above = total
        from_lo = total
        searching = False
    if searching:
        # All that lies below this bound weighs less than what the head leaves out, rounding included.
        lo = t_ref + tl.log2((total - target) / vocab) / c - 1
        from_lo = total
    while searching:
        held = tl.maximum(_next(third), lo)  # every token in [held, hi) is among v1 and v2
        mass = above + _mass(v1, v2, t_ref, c, held)
        if mass >= target:
            searching = False
            lo = held
            from_lo = mass
            beyond = above
            going = True
            while going:
                x1 = lo + 0.25 * (hi - lo)
                x2 = lo + 0.5 * (hi - lo)
                x3 = lo + 0.75 * (hi - lo)
                m1 = beyond + _mass(v1, v2, t_ref, c, x1)
                m2 = beyond + _mass(v1, v2, t_ref, c, x2)
                m3 = beyond + _mass(v1, v2, t_ref, c, x3)
                lo, hi, above, from_lo, going = _narrow(
                    lo, hi, above, from_lo, x1, x2, x3, m1, m2, m3, t_ref, c, target
                )
        else:
            hi = held
            above = mass
            # A value that more than two tokens of a lane share ends the search where it is the crossing.
            x1 = tl.minimum(lo + 0.33 * (hi - lo), third)
            x2 = tl.minimum(lo + 0.66 * (hi - lo), third)
            x3 = third
            walks = 0
            while walks < 4:
                m1, m2, m3 = _masses_of_row(row, vocab, t_ref, c, x1, x2, x3, BLOCK)
                lo, hi, above, from_lo, searching = _narrow(
                    lo, hi, above, from_lo, x1, x2, x3, m1, m2, m3, t_ref, c, target
                )
                few = target - above < (BLOCK // 16) * tl.exp2((hi - t_ref) * c)
                walks = tl.where(searching & (not few), walks + 1, 4)
                x1 = lo + 0.25 * (hi - lo)
                x2 = lo + 0.5 * (hi - lo)
                x3 = lo + 0.75 * (hi - lo)
            if searching:
                v1, v2, third = _largest_below(row, vocab, hi, BLOCK, SUMS)
    return lo, hi, above, from_lo - above
