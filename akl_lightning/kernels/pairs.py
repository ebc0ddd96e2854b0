"""Each divergence as a pair of formulas: what it sums up over the vocabulary, and the slope of that.

A divergence is a sum of ``g(p, q)`` over the vocabulary. With ``c``, the slope of ``g`` in ``q`` with all weights held,
its gradient with respect to the student's logits is ``q (c - Σ q c)``. A pair is called with

- ``log_ratio``: ``log p - log q``, ``[rows, vocab]``; 0 where the token is masked on both sides, ``+inf`` where the
  student's alone is, ``-inf`` where the teacher's is,
- ``p``, ``q``: ``[rows, vocab]``,
- ``a``, ``b``: its two weights, numbers or ``[rows, 1]``, without gradient,

and returns ``g`` and ``q c``, each ``[rows, vocab]``. ``c`` may be off by what is constant over a row's tokens, which
has no part in the gradient: it is taken such that it is 0 for equal probabilities, so that small differences keep their
digits. So does the ratio, which is why it is handed over rather than two logarithms. The same pairs stand, under the
same names, in the Triton kernel.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from akl_lightning.functional import HeadRule, adaptive_weights

Weight = Tensor | float
Pair = Callable[[Tensor, Tensor, Tensor, Weight, Weight], tuple[Tensor, Tensor]]


STATISTICS = (
    "loss", "divergence", "cross_entropy", "fkl", "rkl", "head_gap", "tail_gap", "head_weight", "top1_agreement",
)  # fmt: skip
"""Names of the per-token statistics. Without a teacher only ``loss`` and ``cross_entropy`` exist."""


class Comparison(NamedTuple):
    """How the logits of student and teacher are to be compared."""

    pair: str | None
    """A key of :data:`PAIRS`; None where the divergence is none of ours, and whoever calls adds its value."""

    constant: float = 0.0
    """The divergence's own: ``forward_weight``, ``beta`` or ``skew``; 0 where it has none."""

    alpha: float | Tensor = 0.5
    """Weight of the divergence, for all rows or ``[rows]``; cross entropy has the rest, without a teacher, too."""

    temperature: float = 1.0
    """Softens both; the divergence is scaled by its square."""

    mu: float = 0.5
    """Teacher mass of the head, in (0, 1]."""

    head_rule: HeadRule = "cover"
    """How the head is cut."""


def per_row(alpha: Tensor | float, logits: Tensor) -> Tensor:
    """A weight as one of each row, ``[rows]``, in float64: 1 minus it is wanted, too, before either is rounded."""
    return torch.zeros(len(logits), dtype=torch.float64, device=logits.device).add_(alpha)


# Where one of the two is exp(-80) of the other, or masked, it has no part in a mean of both: ratios are cut to that, so
# that products with a probability of 0 are 0.
_FAR = 80.0

MIXES = ("forward_kl", "reverse_kl", "weighted_kl", "adaptive_kl")
"""The pairs that are ``a * FKL + b * RKL``."""


def weights(how: Comparison, head_gap: Tensor, tail_gap: Tensor) -> tuple[Weight, Weight]:
    """The two weights of a divergence.

    Args:
        how: names the divergence.
        head_gap: ``[rows]``.
        tail_gap: ``[rows]``.

    Returns:
        Those of FKL and RKL, each ``[rows]``, for one of :data:`MIXES`; else the constant, and 1 minus it.
    """
    if how.pair == "adaptive_kl":
        return adaptive_weights(head_gap, tail_gap)
    forward = {"forward_kl": 1.0, "reverse_kl": 0.0}.get(str(how.pair), how.constant)
    if how.pair in MIXES:
        return torch.full_like(head_gap, forward), torch.full_like(head_gap, 1 - forward)
    return forward, 1 - forward


def forward_kl(log_ratio: Tensor, p: Tensor, q: Tensor, a: Weight = 1.0, b: Weight = 0.0) -> tuple[Tensor, Tensor]:
    """``g = p log(p / q)``, so that ``c = -p / q``, here 1 more: ``q - p``, with the digits of small ratios."""
    difference = log_ratio.abs().neg_().expm1_().mul_(torch.maximum(p, q)).mul_(log_ratio.sign())
    return _times(p, log_ratio), difference


def reverse_kl(log_ratio: Tensor, p: Tensor, q: Tensor, a: Weight = 0.0, b: Weight = 1.0) -> tuple[Tensor, Tensor]:
    """``g = q log(q / p)``; a token that the teacher masks makes it infinite and is left out of the slope.

    Of the slope ``log(q / p) + 1`` the 1 is dropped, which would cost the digits of small ratios; where the token is
    left out, what remains is -1.
    """
    return _times(q, -log_ratio), _times(q, (-log_ratio).masked_fill(log_ratio == -torch.inf, -1.0))


def weighted_kl(log_ratio: Tensor, p: Tensor, q: Tensor, a: Weight, b: Weight) -> tuple[Tensor, Tensor]:
    """``a`` times the forward pair and ``b`` times the reverse one."""
    pairs = zip(forward_kl(log_ratio, p, q), reverse_kl(log_ratio, p, q), strict=True)
    g, slope = (_times(a, forward) + _times(b, reverse) for forward, reverse in pairs)
    return g, slope


def jensen_shannon(log_ratio: Tensor, p: Tensor, q: Tensor, a: Weight, b: Weight) -> tuple[Tensor, Tensor]:
    """``g = a p log(p / m) + b q log(q / m)`` with ``m = a p + b q``."""
    log_ratio = log_ratio.clamp(-_FAR, _FAR)
    m_over_q = _log_mean(log_ratio.clone(), a)
    of_p = log_ratio.sub_(m_over_q).mul_(p).mul_(a)
    of_q = m_over_q.mul_(q).mul_(-b)
    return of_p.add_(of_q), of_q


def skew_forward_kl(log_ratio: Tensor, p: Tensor, q: Tensor, a: Weight, b: Weight) -> tuple[Tensor, Tensor]:
    """``g = p log(p / m)`` with ``m = a p + b q``, so that ``c = -b p / m``, here ``b`` more."""
    if a == 0:
        return forward_kl(log_ratio, p, q)
    p_over_m = _log_mean(-log_ratio.clamp(-_FAR, _FAR), b).neg_()
    return p * p_over_m, p_over_m.expm1_().mul_(q).mul_(-b)


def skew_reverse_kl(log_ratio: Tensor, p: Tensor, q: Tensor, a: Weight, b: Weight) -> tuple[Tensor, Tensor]:
    """``g = q log(q / m)`` with ``m = a q + b p``, so that ``c = log(q / m) + 1 - a q / m``, here less its constant."""
    if a == 0:
        return reverse_kl(log_ratio, p, q)
    q_over_m = _log_mean(log_ratio.clamp(-_FAR, _FAR), b).neg_()
    return q * q_over_m, torch.expm1(q_over_m).mul_(-a).add_(q_over_m).mul_(q)


def total_variation(log_ratio: Tensor, p: Tensor, q: Tensor, a: Weight = 0.0, b: Weight = 0.0) -> tuple[Tensor, Tensor]:
    """``g = abs(p - q) / 2``."""
    half = (q - p).mul_(0.5)
    return half.abs(), half.sign().mul_(q).mul_(0.5)


PAIRS: dict[str, Pair] = {
    "forward_kl": forward_kl,
    "reverse_kl": reverse_kl,
    "weighted_kl": weighted_kl,
    "adaptive_kl": weighted_kl,
    "jensen_shannon": jensen_shannon,
    "skew_forward_kl": skew_forward_kl,
    "skew_reverse_kl": skew_reverse_kl,
    "total_variation": total_variation,
}


def _times(weight: Weight, value: Tensor) -> Tensor:
    """The product, where zero times anything is 0."""
    if not isinstance(weight, Tensor):
        return weight * value if weight else torch.zeros_like(value)
    return torch.where(weight == 0, 0.0, weight * value)


def _log_mean(log_ratio: Tensor, weight: Weight) -> Tensor:
    """``log(1 - weight + weight * exp(log_ratio))`` with the digits of small ratios; ``log_ratio`` is used up."""
    if 1 - weight > 2**-7:
        return log_ratio.expm1_().mul_(weight).log1p_()
    # So little is left of 1 that large negative ratios would lose its digits.
    return log_ratio.exp_().mul_(weight).add_(1 - weight).log_()
