"""Divergences between a teacher's and a student's next-token distributions, as pure functions of their logits.

Every divergence takes logits of shape ``[..., vocab]`` and returns one value in nats per token, shape ``[...]``. It
is differentiable in the student's logits only. Softmax, logarithms and sums run in at least float32; float64 stays
float64. With ``temperature`` t both distributions are softened by t and the value is scaled by t², so that the size of
the gradient does not depend on t (Hinton et al. 2015, arXiv 1503.02531).

A token that is masked (logit ``-inf``, or the lowest number of its dtype) on both sides counts 0. One that is masked
on one side and carries mass on the other makes FKL or RKL ``+inf``, with a finite gradient. A zero weight times
anything is 0.
"""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from akl_lightning.errors import UsageError
from akl_lightning.head_tail import HeadRule as HeadRule
from akl_lightning.head_tail import adaptive_weights as adaptive_weights
from akl_lightning.head_tail import check_head as check_head
from akl_lightning.head_tail import head_mask as head_mask
from akl_lightning.head_tail import head_tail_gap as head_tail_gap
from akl_lightning.head_tail import head_weight as head_weight

LOWEST = -3.38e38
"""Logits at or below it are masked: the lowest number of float32, that of bfloat16, which is a little higher, -inf."""


def check_temperature(temperature: float) -> None:
    """Raise :class:`UsageError` unless ``temperature`` is a positive finite number."""
    if not (temperature > 0 and math.isfinite(temperature)):
        raise UsageError(f"temperature must be a positive number, got {temperature}: use 1.0 for no softening.")


def check_fraction(name: str, value: float, *, open_ends: bool = False) -> None:
    """Raise :class:`UsageError` unless ``value`` lies in [0, 1], or in (0, 1) with ``open_ends``."""
    if not (0 < value < 1 if open_ends else 0 <= value <= 1):
        raise UsageError(f"{name} must lie in {'(0, 1)' if open_ends else '[0, 1]'}, got {value}.")


def log_probs(logits: Tensor, temperature: float = 1.0) -> Tensor:
    """Log-probabilities of softened logits in at least float32.

    Args:
        logits: ``[..., vocab]``, any floating dtype.
        temperature: positive; the logits are divided by it.

    Returns:
        ``[..., vocab]`` in float32, or float64 where the logits are.
    """
    check_temperature(temperature)
    masked = logits <= (torch.finfo(torch.float16).min if logits.dtype == torch.float16 else LOWEST)
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    # Added, not filled in: a masked logit is still one that the gradient flows to.
    logits = logits + torch.zeros_like(logits).masked_fill_(masked, -torch.inf)
    return torch.log_softmax(logits if temperature == 1.0 else logits / temperature, dim=-1)


def _of_logits(compare: Callable[..., Tensor], student: Tensor, teacher: Tensor, t: float, *settings: Any) -> Tensor:
    """A divergence of logits at a temperature, from that of log-probabilities."""
    if student.shape != teacher.shape:
        raise UsageError(
            f"student logits {list(student.shape)} and teacher logits {list(teacher.shape)} differ in "
            "shape: both must be [..., vocab] over the same tokens and the same vocabulary."
        )
    return t**2 * compare(log_probs(student, t), log_probs(teacher.detach(), t), *settings)


# --------------------------------------------------------------------------------------------------------------------
# Divergences, first from log-probabilities (the chunked criterion and the modules already hold them), then from logits


def forward_kl_from_log_probs(student: Tensor, teacher: Tensor) -> Tensor:
    """:func:`forward_kl` of log-probabilities."""
    p = teacher.exp()
    # Masked before the product: 0 times -inf would be NaN, in the value and in the gradient.
    entropy = (p * teacher.masked_fill(p == 0, 0)).sum(-1)
    return entropy - (p * student.masked_fill(p == 0, 0)).sum(-1)


def reverse_kl_from_log_probs(student: Tensor, teacher: Tensor) -> Tensor:
    """:func:`reverse_kl` of log-probabilities."""
    return _kl_of_varying(student, teacher)


def _kl_of_varying(log_a: Tensor, log_b: Tensor) -> Tensor:
    """KL(a‖b) with a gradient in both; +inf where b is 0 under mass of a, and the gradient leaves that out."""
    a = log_a.exp()
    ratio = log_a - log_b
    left_out = (a == 0) | (log_b == -torch.inf)
    impossible = ((log_b == -torch.inf) & (a > 0)).any(-1)
    # Masked on both sides of the product so that neither the value nor the gradient meets inf.
    value = (a * torch.where(left_out, 0.0, ratio)).sum(-1)
    return value + torch.zeros_like(value).masked_fill(impossible, torch.inf)


def weighted(weight: Tensor | float, value: Tensor) -> Tensor:
    """``weight * value``, where a zero weight times anything, infinity too, is 0, in the gradient as well."""
    if not isinstance(weight, Tensor):
        return weight * value if weight else torch.zeros_like(value)
    return torch.where(weight == 0, 0.0, weight * value.masked_fill(weight == 0, 0.0))


def adaptive_kl_from_log_probs(
    student: Tensor, teacher: Tensor, mu: float = 0.5, head_rule: HeadRule = "cover"
) -> Tensor:
    """:func:`adaptive_kl` of log-probabilities."""
    forward, reverse = adaptive_weights(*head_tail_gap(student.exp(), teacher.exp(), mu, head_rule))
    fkl, rkl = forward_kl_from_log_probs(student, teacher), reverse_kl_from_log_probs(student, teacher)
    return weighted(forward, fkl) + weighted(reverse, rkl)


def _log_mix(log_a: Tensor, log_b: Tensor, weight_a: float) -> Tensor:
    """log(weight_a * a + (1 - weight_a) * b); -inf, without a NaN in the gradient, where both are 0."""
    nowhere = (log_a == -torch.inf) & (log_b == -torch.inf)
    log_a, log_b = log_a.masked_fill(nowhere, 0.0), log_b.masked_fill(nowhere, 0.0)
    if weight_a == 0:
        return log_b.masked_fill(nowhere, -torch.inf)
    if weight_a == 1:
        return log_a.masked_fill(nowhere, -torch.inf)
    mix = torch.logaddexp(log_a + math.log(weight_a), log_b + math.log1p(-weight_a))
    return mix.masked_fill(nowhere, -torch.inf)


def jensen_shannon_from_log_probs(student: Tensor, teacher: Tensor, beta: float = 0.5) -> Tensor:
    """:func:`jensen_shannon` of log-probabilities."""
    check_fraction("beta", beta, open_ends=True)
    mix = _log_mix(teacher, student, beta)
    return beta * forward_kl_from_log_probs(mix, teacher) + (1 - beta) * _kl_of_varying(student, mix)


def skew_forward_kl_from_log_probs(student: Tensor, teacher: Tensor, skew: float = 0.1) -> Tensor:
    """:func:`skew_forward_kl` of log-probabilities."""
    check_fraction("skew", skew)
    return forward_kl_from_log_probs(_log_mix(teacher, student, skew), teacher)


def skew_reverse_kl_from_log_probs(student: Tensor, teacher: Tensor, skew: float = 0.1) -> Tensor:
    """:func:`skew_reverse_kl` of log-probabilities."""
    check_fraction("skew", skew)
    return _kl_of_varying(student, _log_mix(student, teacher, skew))


def total_variation_from_log_probs(student: Tensor, teacher: Tensor) -> Tensor:
    """:func:`total_variation` of log-probabilities."""
    return 0.5 * (teacher.exp() - student.exp()).abs().sum(-1)


def forward_kl(student_logits: Tensor, teacher_logits: Tensor, temperature: float = 1.0) -> Tensor:
    r"""Forward KL, :math:`\sum_i p_i (\log p_i - \log q_i)`: the classic knowledge-distillation loss.

    Args:
        student_logits: ``[..., vocab]``.
        teacher_logits: ``[..., vocab]``.
        temperature: softens both; the value is scaled by its square.

    Returns:
        ``[...]``, nats.

    Source: Hinton et al. 2015, arXiv 1503.02531; arXiv 2404.02657.

    >>> teacher = torch.tensor([[0.5, 0.25, 0.25]]).log()
    >>> student = torch.tensor([[0.25, 0.5, 0.25]]).log()
    >>> forward_kl(student, teacher)
    tensor([0.1733])
    """
    return _of_logits(forward_kl_from_log_probs, student_logits, teacher_logits, temperature)


def reverse_kl(student_logits: Tensor, teacher_logits: Tensor, temperature: float = 1.0) -> Tensor:
    r"""Reverse KL, :math:`\sum_i q_i (\log q_i - \log p_i)`.

    Arguments and result as in :func:`forward_kl`. Source: MiniLLM, arXiv 2306.08543; arXiv 2404.02657.

    >>> teacher = torch.tensor([[0.5, 0.25, 0.25]]).log()
    >>> student = torch.tensor([[0.8, 0.1, 0.1]]).log()
    >>> reverse_kl(student, teacher)
    tensor([0.1927])
    """
    return _of_logits(reverse_kl_from_log_probs, student_logits, teacher_logits, temperature)


def adaptive_kl(
    student_logits: Tensor,
    teacher_logits: Tensor,
    mu: float = 0.5,
    head_rule: HeadRule = "cover",
    temperature: float = 1.0,
) -> Tensor:
    """Adaptive KL (AKL): ``head_weight * FKL + (1 - head_weight) * RKL``, weighted per token.

    The weights say where student and teacher still differ, see :func:`head_weight`, and are detached. Where the two
    distributions are equal the value and its gradient are 0.

    Args:
        student_logits: ``[..., vocab]``.
        teacher_logits: ``[..., vocab]``.
        mu: teacher mass of the head, in (0, 1].
        head_rule: ``cover`` (the paper) or ``within`` (the authors' code), see :func:`head_mask`.
        temperature: softens both; the value is scaled by its square.

    Returns:
        ``[...]``, nats.

    Source: arXiv 2404.02657.

    >>> teacher = torch.tensor([[0.5, 0.25, 0.25]]).log()
    >>> student = torch.tensor([[0.25, 0.5, 0.25]]).log()
    >>> adaptive_kl(student, teacher)  # half of each KL: the gap is 0.25 in the head, 0.25 in the tail
    tensor([0.1733])
    """
    return _of_logits(adaptive_kl_from_log_probs, student_logits, teacher_logits, temperature, mu, head_rule)


def weighted_kl(
    student_logits: Tensor, teacher_logits: Tensor, forward_weight: float = 0.5, temperature: float = 1.0
) -> Tensor:
    """A fixed mix, ``forward_weight * FKL + (1 - forward_weight) * RKL`` (FKL + RKL in arXiv 2404.02657).

    >>> teacher = torch.tensor([[0.5, 0.25, 0.25]]).log()
    >>> student = torch.tensor([[0.25, 0.5, 0.25]]).log()
    >>> weighted_kl(student, teacher, forward_weight=1.0)
    tensor([0.1733])
    """
    return _of_logits(weighted_kl_from_log_probs, student_logits, teacher_logits, temperature, forward_weight)


def weighted_kl_from_log_probs(student: Tensor, teacher: Tensor, forward_weight: float = 0.5) -> Tensor:
    """:func:`weighted_kl` of log-probabilities."""
    check_fraction("forward_weight", forward_weight)
    forward = weighted(forward_weight, forward_kl_from_log_probs(student, teacher))
    return forward + weighted(1 - forward_weight, reverse_kl_from_log_probs(student, teacher))


def jensen_shannon(
    student_logits: Tensor, teacher_logits: Tensor, beta: float = 0.5, temperature: float = 1.0
) -> Tensor:
    """Generalised Jensen-Shannon divergence, ``beta * KL(p‖m) + (1 - beta) * KL(q‖m)``, ``m = beta p + (1 - beta) q``.

    Arguments and result as in :func:`forward_kl`; ``beta`` in (0, 1). Source: GKD, arXiv 2306.13649.

    >>> teacher = torch.tensor([[1.0, 0.0]]).log()
    >>> student = torch.tensor([[0.0, 1.0]]).log()
    >>> jensen_shannon(student, teacher)  # log 2, its largest value
    tensor([0.6931])
    """
    return _of_logits(jensen_shannon_from_log_probs, student_logits, teacher_logits, temperature, beta)


def skew_forward_kl(
    student_logits: Tensor, teacher_logits: Tensor, skew: float = 0.1, temperature: float = 1.0
) -> Tensor:
    """Skewed forward KL, ``KL(p ‖ skew * p + (1 - skew) * q)``: never infinite for ``skew > 0``.

    Arguments and result as in :func:`forward_kl`. Source: DistiLLM, arXiv 2402.03898.

    >>> teacher = torch.tensor([[1.0, 0.0]]).log()
    >>> student = torch.tensor([[0.0, 1.0]]).log()
    >>> skew_forward_kl(student, teacher)  # -log 0.1
    tensor([2.3026])
    """
    return _of_logits(skew_forward_kl_from_log_probs, student_logits, teacher_logits, temperature, skew)


def skew_reverse_kl(
    student_logits: Tensor, teacher_logits: Tensor, skew: float = 0.1, temperature: float = 1.0
) -> Tensor:
    """Skewed reverse KL, ``KL(q ‖ skew * q + (1 - skew) * p)``: never infinite for ``skew > 0``.

    Arguments and result as in :func:`forward_kl`. Source: DistiLLM, arXiv 2402.03898.

    >>> teacher = torch.tensor([[1.0, 0.0]]).log()
    >>> student = torch.tensor([[0.0, 1.0]]).log()
    >>> skew_reverse_kl(student, teacher)
    tensor([2.3026])
    """
    return _of_logits(skew_reverse_kl_from_log_probs, student_logits, teacher_logits, temperature, skew)


def total_variation(student_logits: Tensor, teacher_logits: Tensor, temperature: float = 1.0) -> Tensor:
    r"""Total variation distance, :math:`\frac{1}{2} \sum_i |p_i - q_i|`, between 0 and 1 (times t²).

    Arguments and result as in :func:`forward_kl`. Source: f-DISTILL, arXiv 2307.15190.

    >>> teacher = torch.tensor([[0.5, 0.25, 0.25]]).log()
    >>> student = torch.tensor([[0.25, 0.5, 0.25]]).log()
    >>> total_variation(student, teacher)
    tensor([0.2500])
    """
    return _of_logits(total_variation_from_log_probs, student_logits, teacher_logits, temperature)
