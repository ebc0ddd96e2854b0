"""The divergences of :mod:`akl_lightning.functional` as modules that a config or command line can name."""

from abc import ABC, abstractmethod

import torch
from torch import Tensor, nn

from akl_lightning import functional as F
from akl_lightning.compat import is_stand_in
from akl_lightning.functional import HeadRule


class Divergence(nn.Module, ABC):
    """How far a student's next-token distribution is from a teacher's.

    Subclass it, write :meth:`compare`, and the criterion, the metrics and the command line take it as they take ours.

    >>> import torch
    >>> class Hellinger(Divergence):
    ...     def compare(self, student, teacher):
    ...         return 1 - (0.5 * (student + teacher)).exp().sum(-1)
    >>> student, teacher = torch.tensor([[0.0, 1.0, 2.0]]), torch.tensor([[0.0, 2.0, 1.0]])
    >>> Hellinger()(student, teacher)
    tensor([0.1030])
    """

    mu: float = 0.5
    """Teacher mass of the head that the statistics (head and tail error) are taken over."""

    head_rule: HeadRule = "cover"
    """How that head is cut."""

    has_reverse_part: bool = True
    """Whether tokens count by the student's probability as well, and the teacher's tail with them. Forward KL has none;
    of a divergence that does not say, it is assumed."""

    @abstractmethod
    def compare(self, student: Tensor, teacher: Tensor) -> Tensor:
        """Value per token.

        Args:
            student: log-probabilities ``[tokens, vocab]``, at least float32.
            teacher: log-probabilities ``[tokens, vocab]``, without gradient.

        Returns:
            ``[tokens]``, differentiable in ``student``.
        """

    def forward(self, student_logits: Tensor, teacher_logits: Tensor, temperature: float = 1.0) -> Tensor:
        """Value per token from logits.

        Args:
            student_logits: ``[..., vocab]``.
            teacher_logits: ``[..., vocab]``.
            temperature: softens both; the value is scaled by its square.

        Returns:
            ``[...]``, nats.
        """
        teacher = F.log_probs(teacher_logits.detach(), temperature)
        return temperature**2 * self.compare(F.log_probs(student_logits, temperature), teacher)

    def value(self, pair: F.Comparison) -> Tensor:
        """Value ``[tokens]``, where no gradient is wanted."""
        return self.compare(pair.student, pair.teacher)

    def value_and_gradient(self, pair: F.Comparison) -> tuple[Tensor, Tensor]:
        """Value per token and its gradient, here through autograd; what the criterion calls, a few tokens at a time.

        Args:
            pair: student and teacher; its ``log_ratio`` may be overwritten.

        Returns:
            Value ``[tokens]``, and its gradient with respect to the student's (softened) logits ``[tokens, vocab]``.
        """
        with torch.enable_grad():
            student = pair.student.detach().requires_grad_()
            value = self.compare(student, pair.teacher)
            (gradient,) = torch.autograd.grad(value.sum(), student)
        return value.detach(), gradient - pair.student_probs * gradient.sum(-1, keepdim=True)


class WeightedPerToken(Divergence):
    """A divergence ``a * FKL + b * RKL``, whose gradient is known in closed form: the weights per token have none.

    Subclasses give the weights and :meth:`compare`.
    """

    @abstractmethod
    def weights(self, head_gap: Tensor, tail_gap: Tensor) -> tuple[Tensor, Tensor]:
        """``a`` and ``b``, each ``[tokens]``.

        Args:
            head_gap: ``[tokens]``.
            tail_gap: ``[tokens]``.
        """

    def value(self, pair: F.Comparison) -> Tensor:
        a, b = self.weights(pair.head_gap, pair.tail_gap)
        return F.weighted(a, pair.fkl) + F.weighted(b, pair.rkl)

    def value_and_gradient(self, pair: F.Comparison) -> tuple[Tensor, Tensor]:
        """As in :class:`Divergence`: FKL's gradient is ``q - p``, RKL's is ``q * (log q - log p - RKL)``."""
        a, b = self.weights(pair.head_gap, pair.tail_gap)
        value = a * pair.fkl + b * pair.rkl
        irregular = super().value_and_gradient(pair.rows(pair.irregular)) if pair.irregular.numel() else None
        # q * (a - b * RKL - b * log_ratio) - a * p, in place: passes over the vocabulary are what a large one costs.
        gradient = pair.log_ratio.mul_(-b[:, None]).add_((a - b * pair.rkl)[:, None]).mul_(pair.student_probs)
        gradient.addcmul_(pair.teacher_probs, -a[:, None])
        if irregular is not None:
            value[pair.irregular], gradient[pair.irregular] = irregular
        return value, gradient


class AdaptiveKL(WeightedPerToken):
    """Adaptive KL of arXiv 2404.02657: FKL and RKL weighted per token by where student and teacher still differ.

    Args:
        mu: teacher mass of the head, in (0, 1].
        head_rule: ``cover`` (the paper) or ``within`` (the authors' published code).
    """

    def __init__(self, mu: float = 0.5, head_rule: HeadRule = "cover") -> None:
        super().__init__()
        F.check_head(mu, head_rule)
        self.mu = mu
        self.head_rule = head_rule

    def compare(self, student: Tensor, teacher: Tensor) -> Tensor:
        return F.adaptive_kl_from_log_probs(student, teacher, self.mu, self.head_rule)

    def weights(self, head_gap: Tensor, tail_gap: Tensor) -> tuple[Tensor, Tensor]:
        return F.adaptive_weights(head_gap, tail_gap)


class ForwardKL(WeightedPerToken):
    """Forward KL, ``KL(p‖q)``."""

    has_reverse_part = False

    def compare(self, student: Tensor, teacher: Tensor) -> Tensor:
        return F.forward_kl_from_log_probs(student, teacher)

    def weights(self, head_gap: Tensor, tail_gap: Tensor) -> tuple[Tensor, Tensor]:
        return torch.ones_like(head_gap), torch.zeros_like(head_gap)


class ReverseKL(WeightedPerToken):
    """Reverse KL, ``KL(q‖p)``."""

    def compare(self, student: Tensor, teacher: Tensor) -> Tensor:
        return F.reverse_kl_from_log_probs(student, teacher)

    def weights(self, head_gap: Tensor, tail_gap: Tensor) -> tuple[Tensor, Tensor]:
        return torch.zeros_like(head_gap), torch.ones_like(head_gap)


class WeightedKL(WeightedPerToken):
    """A fixed mix of forward and reverse KL.

    Args:
        forward_weight: weight of FKL, in [0, 1]; RKL gets the rest.
    """

    def __init__(self, forward_weight: float = 0.5) -> None:
        super().__init__()
        F.check_fraction("forward_weight", forward_weight)
        self.forward_weight = forward_weight
        self.has_reverse_part = forward_weight < 1

    def compare(self, student: Tensor, teacher: Tensor) -> Tensor:
        return F.weighted_kl_from_log_probs(student, teacher, self.forward_weight)

    def weights(self, head_gap: Tensor, tail_gap: Tensor) -> tuple[Tensor, Tensor]:
        return torch.full_like(head_gap, self.forward_weight), torch.full_like(head_gap, 1 - self.forward_weight)


class JensenShannon(Divergence):
    """Generalised Jensen-Shannon divergence of GKD, arXiv 2306.13649.

    Args:
        beta: weight of the teacher in the mixture, in (0, 1).
    """

    def __init__(self, beta: float = 0.5) -> None:
        super().__init__()
        F.check_fraction("beta", beta, open_ends=True)
        self.beta = beta

    def compare(self, student: Tensor, teacher: Tensor) -> Tensor:
        return F.jensen_shannon_from_log_probs(student, teacher, self.beta)


class SkewKL(Divergence):
    """Skewed KL of DistiLLM, arXiv 2402.03898.

    Args:
        skew: how much of the first distribution is mixed into the second, in [0, 1].
        reverse: ``KL(q ‖ skew q + (1 - skew) p)`` instead of ``KL(p ‖ skew p + (1 - skew) q)``.
    """

    def __init__(self, skew: float = 0.1, reverse: bool = False) -> None:
        super().__init__()
        F.check_fraction("skew", skew)
        self.skew = skew
        self.reverse = self.has_reverse_part = reverse

    def compare(self, student: Tensor, teacher: Tensor) -> Tensor:
        compare = F.skew_reverse_kl_from_log_probs if self.reverse else F.skew_forward_kl_from_log_probs
        return compare(student, teacher, self.skew)


class TotalVariation(Divergence):
    """Total variation distance, half the sum of ``abs(p - q)``; f-DISTILL, arXiv 2307.15190."""

    def compare(self, student: Tensor, teacher: Tensor) -> Tensor:
        return F.total_variation_from_log_probs(student, teacher)


def known_divergences() -> list[str]:
    """Names of every divergence defined so far, a user's own included."""
    names, waiting = set(), [Divergence]
    while waiting:
        cls = waiting.pop()
        waiting += cls.__subclasses__()
        # What jsonargparse makes of a default is a class of its own.
        if not cls.__abstractmethods__ and not is_stand_in(cls):
            names.add(cls.__name__)
    return sorted(names)
