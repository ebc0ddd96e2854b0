"""Head and tail of the teacher's distribution, and where the student still differs there: the weights of AKL."""

from typing import Literal, get_args

import torch
from torch import Tensor

from akl_lightning.errors import UsageError

HeadRule = Literal["cover", "within"]

# Mass is added up in units of 2⁻⁶⁰: sums of integers are exact, so that they do not depend on the order or the device.
_UNIT = 2.0**60
_NEARLY = 1e-6


def check_head(mu: float, head_rule: str) -> None:
    """Raise :class:`UsageError` unless ``mu`` lies in (0, 1] and ``head_rule`` is known."""
    if not 0 < mu <= 1:
        raise UsageError(f"mu must lie in (0, 1], got {mu}: it is the teacher mass that the head covers, 0.5 usually.")
    if head_rule not in get_args(HeadRule):
        raise UsageError(f"head_rule must be one of {', '.join(get_args(HeadRule))}, got {head_rule!r}.")


def head_size(ordered: Tensor, mu: float = 0.5, head_rule: HeadRule = "cover") -> Tensor:
    """How many of a row's tokens form its head, at least 1.

    Args:
        ordered: probabilities ``[..., k]`` in descending order, all of them or the largest k.
        mu: mass of the head, in (0, 1).
        head_rule: ``cover`` or ``within``.

    Returns:
        ``[..., 1]``, int64; k where the head may reach beyond the largest k.
    """
    mass = ordered.double().nan_to_num(0.0).mul(_UNIT).long().cumsum(-1)
    if head_rule == "cover":
        size = (mass < int(mu * (1 - _NEARLY) * _UNIT)).sum(-1, keepdim=True) + 1
    else:
        size = (mass <= int(mu * (1 + _NEARLY) * _UNIT)).sum(-1, keepdim=True)
    return size.minimum((ordered > 0).sum(-1, keepdim=True)).clamp(min=1)


def membership(probs: Tensor, ordered: Tensor, size: Tensor) -> Tensor:
    """How far each token belongs to a head of some size: those that tie at its end share what is left of it.

    Args:
        probs: ``[..., n]``, the row, or its largest probabilities if these hold all that tie.
        ordered: the row's probabilities, in descending order, ``[..., k]``; those of the head at least.
        size: tokens of the head, ``[..., 1]``.

    Returns:
        ``[..., n]`` in [0, 1].
    """
    last = ordered.gather(-1, size - 1)
    tie = probs == last
    left = size - (ordered > last).sum(-1, keepdim=True)
    share = (left / tie.sum(-1, keepdim=True)).to(probs.dtype)
    # Without mass a token never belongs to the head.
    return torch.where(tie, share, (probs > last).to(probs.dtype)) * (probs > 0)


def head_mask(teacher_probs: Tensor, mu: float = 0.5, head_rule: HeadRule = "cover") -> Tensor:
    """How far each token belongs to the head of the teacher's distribution.

    ``cover`` (the paper): the smallest set of tokens, in descending probability, whose mass is at least ``mu``; the
    token that crosses ``mu`` belongs to it. ``within`` (the authors' published code): the largest such set whose mass
    is at most ``mu``, and always the top token. A mass that differs from ``mu`` by a millionth of it counts as equal.
    Of ``n`` tokens that tie at the crossing, where ``k`` of them are needed (or fit), each belongs to the head with
    ``k / n``: nothing depends on the order of the vocabulary.

    Args:
        teacher_probs: ``[..., vocab]``, each row a distribution.
        mu: mass of the head, in (0, 1]; 1 takes every token that has any.
        head_rule: ``cover`` or ``within``.

    Returns:
        ``[..., vocab]`` in the dtype of the probabilities: 1 in the head, 0 in the tail, a fraction where tokens tie.

    Raises:
        UsageError: ``mu`` outside (0, 1] or an unknown ``head_rule``.

    Source: arXiv 2404.02657.

    >>> p = torch.tensor([0.1, 0.4, 0.3, 0.2])
    >>> head_mask(p)
    tensor([0., 1., 1., 0.])
    >>> head_mask(p, head_rule="within")
    tensor([0., 1., 0., 0.])
    >>> head_mask(torch.tensor([0.4, 0.3, 0.3]))
    tensor([1.0000, 0.5000, 0.5000])
    """
    check_head(mu, head_rule)
    if mu == 1:
        return (teacher_probs > 0).to(teacher_probs.dtype)
    ordered = teacher_probs.sort(-1, descending=True).values
    return membership(teacher_probs, ordered, head_size(ordered, mu, head_rule))


def head_tail_gap(
    student_probs: Tensor, teacher_probs: Tensor, mu: float = 0.5, head_rule: HeadRule = "cover"
) -> tuple[Tensor, Tensor]:
    """Where student and teacher still differ: ``abs(p - q)`` summed over head and tail.

    Args:
        student_probs: ``[..., vocab]``.
        teacher_probs: ``[..., vocab]``; its head and tail count, see :func:`head_mask`.
        mu: mass of the head, in (0, 1].
        head_rule: ``cover`` or ``within``.

    Returns:
        ``(head_gap, tail_gap)``, each ``[...]``, between 0 and 2 together; detached.

    Source: arXiv 2404.02657.

    >>> p, q = torch.tensor([0.1, 0.4, 0.3, 0.2]), torch.tensor([0.25, 0.25, 0.25, 0.25])
    >>> [round(gap.item(), 4) for gap in head_tail_gap(q, p)]
    [0.2, 0.2]
    """
    p = teacher_probs.detach()
    gap = (p - student_probs.detach()).abs()
    total, head = gap.sum(-1), (gap * head_mask(p, mu, head_rule)).sum(-1)
    return head, (total - head).clamp(min=0)


def head_weight(head_gap: Tensor, tail_gap: Tensor) -> Tensor:
    """The weight AKL gives to FKL: ``head_gap / (head_gap + tail_gap)``; RKL gets 1 minus it.

    Where both gaps are 0 nothing is left to learn; the weight is then given as 0.5.

    Args:
        head_gap: ``[...]``.
        tail_gap: ``[...]``.

    Source: arXiv 2404.02657.

    >>> head_weight(torch.tensor([0.3, 0.0]), torch.tensor([0.1, 0.0]))
    tensor([0.7500, 0.5000])
    """
    total = head_gap + tail_gap
    # Unequal to 0, not above it: NaN has to stay NaN, so that it is noticed.
    return torch.where(total != 0, head_gap / total.clamp(min=torch.finfo(total.dtype).tiny), 0.5)


def adaptive_weights(head_gap: Tensor, tail_gap: Tensor) -> tuple[Tensor, Tensor]:
    """The weights AKL gives to FKL and to RKL, each ``[...]``: both 0 where the distributions are equal.

    Args:
        head_gap: ``[...]``.
        tail_gap: ``[...]``.

    >>> adaptive_weights(torch.tensor([0.3, 0.0]), torch.tensor([0.1, 0.0]))
    (tensor([0.7500, 0.0000]), tensor([0.2500, 0.0000]))
    """
    weight = head_weight(head_gap, tail_gap)
    differs = head_gap + tail_gap != 0
    return weight * differs, (1 - weight) * differs
