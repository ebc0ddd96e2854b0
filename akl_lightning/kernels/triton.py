"""The comparison as a Triton kernel: one program per token, three walks over its row, nothing waits for the host.

With logits ``s`` and ``t``, references ``S`` and ``T`` near their maxima, ``e_s = exp(s - S)``, ``e_t = exp(t - T)``
and ``d = (t - T) - (s - S)``, all at the temperature:

1. ``l_s = Σ e_s``, ``l_t = Σ e_t``, ``FKL = Σ e_t d / l_t - log(l_t / l_s)``, ``RKL = log(l_t / l_s) - Σ e_s d / l_s``:
   no difference of large numbers, so that a student near its teacher keeps its digits. The references are guesses;
   where they turn out far from the row's maxima, the walk is done again with those. Each lane keeps its three largest
   teacher logits, among which the head's end is then searched (triton_head.py).
2. ``Σ abs(p - q)`` over the row and over the head, and what a divergence sums up over the row (``g`` and ``q c``). It
   runs backwards: what the first has read last is what the cache still holds.
3. The gradient, ``q c - q Σ q c`` and that of cross entropy. A block is read before it is written: it may replace the
   student's logits.

On an H100, 2,048 rows of 151,936 float32 logits with a bfloat16 gradient took 2.53 ms. At 26 bytes a logit these are
3.2 TB/s, 107 % of what a copy moves (2.99 TB/s): the second walk finds part of the row in the cache. A plain version,
one program per token as well, had taken 3.19 ms on the faster H200.
"""

# mypy: disable-error-code="no-untyped-def"
from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from akl_lightning.kernels.pairs import STATISTICS, Comparison, per_row
from akl_lightning.kernels.triton_common import INTERPRETED, jit, load, tl, triton
from akl_lightning.kernels.triton_head import crossing
from akl_lightning.kernels.triton_pairs import PAIRS
from akl_lightning.kernels.triton_walks import gradient_of, reference, slope_without_masked, sum_gaps, sums

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


class Launch(NamedTuple):
    """How the work is laid out on the multiprocessors; it does not change the result beyond rounding."""

    block: int
    warps: int


def supports(student: Tensor, teacher: Tensor | None) -> bool:
    """Whether the kernel takes these logits: Triton and a GPU that it knows, or its interpreter."""
    if triton is None or not all(
        x.dtype in _DTYPES and x.stride(1) == 1 and x.shape[1] < 2**30 for x in (student, teacher) if x is not None
    ):
        return False
    if INTERPRETED:
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
        block, warps = launch or _launch(vocab)
        into = student if gradient is None else gradient
        options = {"num_warps": warps, "num_stages": 1, "enable_fp_fusion": True}
        if teacher is None:
            _cross_entropy[(rows,)](
                student, into, labels, out, per_row(how.alpha, student), vocab, rows, student.stride(0), into.stride(0),
                GRADIENT=gradient is not None, BLOCK=block, **options,
            )  # fmt: skip
        else:
            alpha, alphas = (0.0, how.alpha.contiguous()) if isinstance(how.alpha, Tensor) else (how.alpha, None)
            # Sums are kept for each four neighbours where these are in one thread: in aligned rows, read four at once.
            aligned = all(x.stride(0) % 16 == x.data_ptr() % 16 == 0 for x in (student, teacher, into))
            _compare[(rows,)](
                student, teacher, into, labels, out, alphas, vocab, rows,
                student.stride(0), teacher.stride(0), into.stride(0),
                alpha, how.temperature, _goal(how), int(how.head_rule == "within"), a, b, adaptive,
                PAIR=divergence, SOFTENED=how.temperature != 1, GRADIENT=gradient is not None, BLOCK=block,
                SUMS=block // 4 if aligned and block == 128 * warps else block, **options,
            )  # fmt: skip
    return dict(zip(names, out.unbind(), strict=True))


def _launch(vocab: int) -> Launch:
    """The fastest of those tried on an H100 for every pair: 1,024 threads of four logits, with 64 registers each."""
    if vocab <= 1024:
        return Launch(max(64, triton.next_power_of_2(vocab)), 4)
    return Launch(2048, 16) if vocab <= 2048 else Launch(4096, 32)


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


@jit(do_not_specialize=["vocab", "rows", "within", "adaptive"])
def _compare(
    S, T, G, LABELS, OUT, ALPHA, vocab, rows, s_stride, t_stride, g_stride,
    alpha, temperature, goal, within, a, b, adaptive,
    PAIR: tl.constexpr, SOFTENED: tl.constexpr, GRADIENT: tl.constexpr,
    BLOCK: tl.constexpr, SUMS: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    S += row * s_stride
    T += row * t_stride
    lane = tl.arange(0, BLOCK)
    blocks = vocab // BLOCK
    c = 1.4426950408889634 / temperature
    scale = 1 / temperature

    label = tl.load(LABELS + row).to(tl.int32)
    s_ref = reference(S, label, vocab, BLOCK)
    t_ref = reference(T, label, vocab, BLOCK)
    ls, lt, lh, fk, rk, s_top, v1, v2, v3 = sums(S, T, vocab, s_ref, t_ref, c, SOFTENED, BLOCK, SUMS)
    s_max = tl.max(s_top, 0)
    t_max = tl.max(v1, 0)
    far = tl.maximum(tl.abs(s_max - s_ref), tl.abs(t_max - t_ref)) * tl.maximum(c, 1.4426950408889634)
    if far > 16:  # exp would overflow, or its argument be rounded where it counts most
        s_ref = s_max
        t_ref = t_max
        ls, lt, lh, fk, rk, s_top, v1, v2, v3 = sums(S, T, vocab, s_ref, t_ref, c, SOFTENED, BLOCK, SUMS)
    sum_s = tl.sum(ls, 0)
    sum_t = tl.sum(lt, 0)
    third = tl.max(v3, 0)
    per_s = 1 / sum_s
    per_t = 1 / sum_t
    # Of equal rows nothing may remain, and 1 / x is not exact on a GPU.
    ratio = tl.where(sum_s == sum_t, 1.0, sum_t * per_s)
    log_ratio = tl.log(ratio)
    sum_rk = tl.sum(rk, 0)
    fkl = tl.sum(fk, 0) * per_t / temperature - log_ratio
    rkl = log_ratio - sum_rk * per_s / temperature
    per_h = per_s
    if SOFTENED:
        per_h = 1 / tl.sum(lh, 0)
    label = tl.load(LABELS + row).to(tl.int32)
    of_label = tl.load(S + label, mask=(label >= 0) & (label < vocab), other=float("nan")).to(tl.float32)
    cross_entropy = s_ref - of_label - tl.log(per_h)
    # Stored as soon as they are known: the next walk has no register to spare.
    OUT += row
    tl.store(OUT + 2 * rows, cross_entropy)
    tl.store(OUT + 3 * rows, fkl)
    tl.store(OUT + 4 * rows, rkl)

    target = goal * sum_t
    lo, hi, above, inside = crossing(T, vocab, v1, v2, t_max, third, t_ref, c, sum_t, target, BLOCK, SUMS)
    # How many tokens tie at the crossing, and how many of them the head needs, or holds.
    ties = tl.maximum(tl.floor(inside / tl.exp2((lo - t_ref) * c) + 0.499), 1.0)
    missing = (target - above) / (inside / ties)
    if within:
        held = tl.minimum(tl.maximum(tl.floor(missing), tl.where(hi > t_max, 1.0, 0.0)), ties)
    else:
        held = tl.minimum(tl.maximum(tl.ceil(missing), 1.0), ties)
    share = tl.where(inside > 0, held / ties, 0.0)

    zero = tl.zeros([SUMS], tl.float32)
    total, head, value, slopes = zero, zero, zero, zero
    best = tl.full([SUMS], float("-inf"), tl.float32)
    if blocks * BLOCK < vocab:
        rest = blocks * BLOCK + lane
        s = load(S, rest, vocab, True, "")
        t = load(T, rest, vocab, True, "")
        total, head, best, value, slopes = sum_gaps(
            s, t, s_ref, t_ref, c, scale, per_t, per_s, ratio, log_ratio, lo, hi, share, t_max, a, b,
            total, head, best, value, slopes, PAIR, SUMS,
        )  # fmt: skip
    for i in range(0, blocks):
        block = blocks - 1 - i
        s = load(S, block * BLOCK + lane, vocab, False, "")
        t = load(T, block * BLOCK + lane, vocab, False, "")
        total, head, best, value, slopes = sum_gaps(
            s, t, s_ref, t_ref, c, scale, per_t, per_s, ratio, log_ratio, lo, hi, share, t_max, a, b,
            total, head, best, value, slopes, PAIR, SUMS,
        )  # fmt: skip
    gap = tl.sum(total, 0) * per_t
    head_gap = tl.sum(head, 0) * per_t
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
            finite, masked = slope_without_masked(S, T, vocab, s_ref, t_ref, c, BLOCK)
            slope_of_rkl = log_ratio * (1 - masked * per_s) - finite * per_s / temperature - masked * per_s
        slope = b * slope_of_rkl
    else:
        divergence = tl.sum(value, 0)
        slope = tl.sum(slopes, 0)
    divergence *= temperature * temperature
    agrees = tl.where(tl.max(best, 0) == s_max, 1.0, 0.0)
    if ALPHA is not None:
        alpha = tl.load(ALPHA + row).to(tl.float32)
    tl.store(
        OUT, tl.where(alpha == 0, 0.0, alpha * divergence) + tl.where(alpha == 1, 0.0, (1 - alpha) * cross_entropy)
    )
    tl.store(OUT + rows, divergence)
    tl.store(OUT + 5 * rows, head_gap)
    tl.store(OUT + 6 * rows, tail_gap)
    tl.store(OUT + 7 * rows, weight)
    tl.store(OUT + 8 * rows, agrees)

    if GRADIENT:
        # The gradient is es (of_q + of_qr r) + of_apart (es ratio - et), or of a pair, and minus hard at the label.
        G += row * g_stride
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
            s = load(S, rest, vocab, True, "evict_first")
            t = load(T, rest, vocab, True, "evict_first")
            g = gradient_of(
                s, t, rest == label, s_ref, t_ref, c, scale, per_t, per_s, ratio, log_ratio,
                of_q, of_qr, of_apart, soft, of_h, hard, a, b, PAIR, SOFTENED,
            )  # fmt: skip
            tl.store(G + rest, g.to(G.dtype.element_ty), mask=rest < vocab)
        for i in range(0, blocks):
            s = load(S, i * BLOCK + lane, vocab, False, "evict_first")
            t = load(T, i * BLOCK + lane, vocab, False, "evict_first")
            g = gradient_of(
                s, t, lane == label - i * BLOCK, s_ref, t_ref, c, scale, per_t, per_s, ratio, log_ratio,
                of_q, of_qr, of_apart, soft, of_h, hard, a, b, PAIR, SOFTENED,
            )  # fmt: skip
            tl.store(G + (i * BLOCK + lane), g.to(G.dtype.element_ty))


@jit(do_not_specialize=["vocab", "rows"])
def _cross_entropy(
    S, G, LABELS, OUT, ALPHA, vocab, rows, s_stride, g_stride,
    GRADIENT: tl.constexpr, BLOCK: tl.constexpr,
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
    ref = reference(S, label, vocab, BLOCK)
    walks = 0
    while walks < 2:
        for i in range(0, blocks):
            s = load(S, i * BLOCK + lane, vocab, False, "")
            total += tl.exp2((s - ref) * 1.4426950408889634)
            top = tl.maximum(top, s)
        if blocks * BLOCK < vocab:
            s = load(S, rest, vocab, True, "")
            total += tl.exp2((s - ref) * 1.4426950408889634)
            top = tl.maximum(top, s)
        largest = tl.max(top, 0)
        walks = tl.where(tl.abs(largest - ref) > 11, walks + 1, 2)
        if walks == 1:
            ref = largest
            total = tl.zeros([BLOCK], tl.float32)
    mass = tl.sum(total, 0)
    cross_entropy = ref - of_label + tl.log(mass)
    weight = 1 - tl.load(ALPHA + row).to(tl.float32)
    tl.store(OUT + row, tl.where(weight == 0, 0.0, weight * cross_entropy))
    tl.store(OUT + rows + row, cross_entropy)
    if GRADIENT:
        G += row * g_stride
        per = weight / mass
        for start in range(0, vocab, BLOCK):
            at = start + lane
            s = load(S, at, vocab, True, "evict_first")
            g = tl.exp2((s - ref) * 1.4426950408889634) * per - tl.where(at == label, weight, 0.0)
            tl.store(G + at, g.to(G.dtype.element_ty), mask=at < vocab)
