"""What one batch costs: a divergence to the teacher mixed with the cross entropy of the data."""

from typing import NamedTuple, final

import torch
from jsonargparse import lazy_instance
from torch import Tensor, nn

from akl_lightning import functional as F
from akl_lightning.divergences import AdaptiveKL, Divergence, known_divergences
from akl_lightning.errors import UsageError

STATISTICS = (
    "loss",
    "divergence",
    "cross_entropy",
    "fkl",
    "rkl",
    "head_gap",
    "tail_gap",
    "head_weight",
    "top1_agreement",
)
"""Names of the per-token statistics. Without a teacher only ``loss`` and ``cross_entropy`` exist."""


class CriterionOutput(NamedTuple):
    """What :class:`DistillationCriterion` returns."""

    loss: Tensor
    """Scalar: the *sum* over tokens, to be divided once by the tokens of the whole optimizer step."""

    statistics: dict[str, Tensor]
    """One float tensor ``[tokens]`` per name in :data:`STATISTICS`, detached."""


# Final, so that the command line reads its arguments in place: --model.criterion.alpha, not init_args.
@final
class DistillationCriterion(nn.Module):
    """``alpha * divergence + (1 - alpha) * cross_entropy``, summed over response positions.

    Args:
        divergence: compares student and teacher at each response position.
        alpha: weight of the divergence, in [0, 1]; with 0 no teacher is needed (supervised fine-tuning).
        temperature: softens both distributions before they are compared; the divergence is scaled by its square.
            Cross entropy is not softened.
        ignore_index: label of the positions that are no response positions.

    Raises:
        UsageError: a value out of its range, or a divergence that is none.

    >>> criterion = DistillationCriterion(alpha=1.0)
    >>> student, teacher = torch.tensor([[0.0, 1.0]]), torch.tensor([[1.0, 0.0]])
    >>> output = criterion(student, teacher, labels=torch.tensor([1]))
    >>> output.loss
    tensor(0.4621)
    >>> output.statistics["head_weight"]
    tensor([0.5000])
    """

    def __init__(
        self,
        divergence: Divergence = lazy_instance(AdaptiveKL),  # noqa: B008 (how jsonargparse wants a default)
        alpha: float = 0.5,
        temperature: float = 1.0,
        ignore_index: int = -100,
    ) -> None:
        super().__init__()
        if not isinstance(divergence, Divergence):
            raise UsageError(f"unknown divergence {divergence!r}: use one of {', '.join(known_divergences())}.")
        F.check_fraction("alpha", alpha)
        F.check_temperature(temperature)
        self.divergence = divergence
        self.alpha = alpha
        self.temperature = temperature
        self.ignore_index = ignore_index

    @property
    def needs_teacher(self) -> bool:
        """Whether the loss depends on a teacher."""
        return self.alpha > 0

    def response_labels(self, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Find the response positions, whose hidden states predict a labelled next token.

        Args:
            labels: ``[batch, length]``, not shifted; ``ignore_index`` where nothing is to be learnt.

        Returns:
            Boolean positions ``[batch, length]`` and the labels that they predict, ``[tokens]``.
        """
        following = torch.nn.functional.pad(labels[:, 1:], (0, 1), value=self.ignore_index)
        positions = following != self.ignore_index
        return positions, following[positions]

    def forward(self, student: Tensor, teacher: Tensor | None, labels: Tensor) -> CriterionOutput:
        """Compare at response positions.

        Args:
            student: logits ``[tokens, vocab]``.
            teacher: logits ``[tokens, vocab]``, or None with ``alpha = 0``.
            labels: ``[tokens]``, the tokens of the data.
        """
        # float() would cut float64 short; log_probs raises to float32 at least.
        student_log_probs = F.log_probs(student)
        cross_entropy = -student_log_probs.gather(-1, labels[:, None]).squeeze(-1)
        if teacher is None:
            if self.needs_teacher:
                raise UsageError(f"alpha = {self.alpha} needs a teacher: give one, or set alpha to 0.")
            per_token = cross_entropy
            statistics = {"loss": per_token, "cross_entropy": cross_entropy}
            return CriterionOutput(per_token.sum(), {name: value.detach() for name, value in statistics.items()})

        teacher_log_probs = F.log_probs(teacher.detach(), self.temperature)
        if self.temperature != 1:
            student_log_probs = F.log_probs(student, self.temperature)
        divergence = self.temperature**2 * self.divergence.compare(student_log_probs, teacher_log_probs)
        # Not a plain sum: zero times infinity is zero here, a weight of 0 switches its part off.
        per_token = F.weighted(self.alpha, divergence) + F.weighted(1 - self.alpha, cross_entropy)
        statistics = {"loss": per_token, "divergence": divergence, "cross_entropy": cross_entropy}
        statistics |= self._compare(student_log_probs.detach(), teacher_log_probs)
        return CriterionOutput(per_token.sum(), {name: value.detach() for name, value in statistics.items()})

    def _compare(self, student: Tensor, teacher: Tensor) -> dict[str, Tensor]:
        head_gap, tail_gap = F.head_tail_gap(
            student.exp(), teacher.exp(), self.divergence.mu, self.divergence.head_rule
        )
        return {
            "fkl": F.forward_kl_from_log_probs(student, teacher),
            "rkl": F.reverse_kl_from_log_probs(student, teacher),
            "head_gap": head_gap,
            "tail_gap": tail_gap,
            "head_weight": F.head_weight(head_gap, tail_gap),
            "top1_agreement": (student.argmax(-1) == teacher.argmax(-1)).to(student.dtype),
        }
