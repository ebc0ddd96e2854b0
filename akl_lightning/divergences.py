"""The divergences of :mod:`akl_lightning.functional` as modules that a config or command line can name."""

from abc import ABC, abstractmethod
from typing import Any

from torch import Tensor, nn

from akl_lightning import functional as F
from akl_lightning.functional import HeadRule


class Divergence(nn.Module, ABC):
    """How far a student's next-token distribution is from a teacher's.

    Subclass it, write :meth:`compare`, and the criterion, the metrics and the command line take it as they take ours:
    its gradient comes from autograd, some tokens at a time. Those of this module name a pair of formulas instead
    (:attr:`pair`), which costs less.

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

    @property
    def pair(self) -> str | None:
        """The key of its formulas in :data:`akl_lightning.kernels.pairs.PAIRS`, or None where autograd is to do it."""
        return None

    @property
    def constant(self) -> float:
        """The number that these formulas take, 0 where they take none."""
        return 0.0

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if "compare" in vars(cls) and "pair" not in vars(cls):
            cls.pair = None  # type: ignore[assignment,method-assign]  # the formulas it inherits are another divergence's

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


class AdaptiveKL(Divergence):
    """Adaptive KL of arXiv 2404.02657: FKL and RKL weighted per token by where student and teacher still differ.

    Args:
        mu: teacher mass of the head, in (0, 1].
        head_rule: ``cover`` (the paper) or ``within`` (the authors' published code).
    """

    pair = "adaptive_kl"

    def __init__(self, mu: float = 0.5, head_rule: HeadRule = "cover") -> None:
        super().__init__()
        F.check_head(mu, head_rule)
        self.mu = mu
        self.head_rule = head_rule

    def compare(self, student: Tensor, teacher: Tensor) -> Tensor:
        return F.adaptive_kl_from_log_probs(student, teacher, self.mu, self.head_rule)


class ForwardKL(Divergence):
    """Forward KL, ``KL(p‖q)``."""

    pair = "forward_kl"
    has_reverse_part = False

    def compare(self, student: Tensor, teacher: Tensor) -> Tensor:
        return F.forward_kl_from_log_probs(student, teacher)


class ReverseKL(Divergence):
    """Reverse KL, ``KL(q‖p)``."""

    pair = "reverse_kl"

    def compare(self, student: Tensor, teacher: Tensor) -> Tensor:
        return F.reverse_kl_from_log_probs(student, teacher)


class WeightedKL(Divergence):
    """A fixed mix of forward and reverse KL.

    Args:
        forward_weight: weight of FKL, in [0, 1]; RKL gets the rest.
    """

    pair = "weighted_kl"

    def __init__(self, forward_weight: float = 0.5) -> None:
        super().__init__()
        F.check_fraction("forward_weight", forward_weight)
        self.forward_weight = forward_weight
        self.has_reverse_part = forward_weight < 1

    @property
    def constant(self) -> float:
        return self.forward_weight

    def compare(self, student: Tensor, teacher: Tensor) -> Tensor:
        return F.weighted_kl_from_log_probs(student, teacher, self.forward_weight)


class JensenShannon(Divergence):
    """Generalised Jensen-Shannon divergence of GKD, arXiv 2306.13649.

    Args:
        beta: weight of the teacher in the mixture, in (0, 1).
    """

    pair = "jensen_shannon"

    def __init__(self, beta: float = 0.5) -> None:
        super().__init__()
        F.check_fraction("beta", beta, open_ends=True)
        self.beta = beta

    @property
    def constant(self) -> float:
        return self.beta

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

    @property
    def pair(self) -> str:
        return "skew_reverse_kl" if self.reverse else "skew_forward_kl"

    @property
    def constant(self) -> float:
        return self.skew

    def compare(self, student: Tensor, teacher: Tensor) -> Tensor:
        compare = F.skew_reverse_kl_from_log_probs if self.reverse else F.skew_forward_kl_from_log_probs
        return compare(student, teacher, self.skew)


class TotalVariation(Divergence):
    """Total variation distance, half the sum of ``abs(p - q)``; f-DISTILL, arXiv 2307.15190."""

    pair = "total_variation"

    def compare(self, student: Tensor, teacher: Tensor) -> Tensor:
        return F.total_variation_from_log_probs(student, teacher)


def known_divergences() -> list[str]:
    """Names of every divergence defined so far, a user's own included."""
    names, waiting = set(), [Divergence]
    while waiting:
        cls = waiting.pop()
        waiting += cls.__subclasses__()
        # A class that changes nothing, as jsonargparse makes one of a default, is the divergence that it derives from.
        if not cls.__abstractmethods__ and vars(cls).keys() & {"compare", "__init__"}:
            names.add(cls.__name__)
    return sorted(names)
