"""What one batch costs: a divergence to the teacher mixed with the cross entropy of the data."""

from collections.abc import Callable
from functools import cache
from typing import Any, NamedTuple, final

import torch
from jsonargparse import lazy_instance
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor, nn
from torch._dynamo.exc import TorchDynamoException

from akl_lightning import functional as F
from akl_lightning.divergences import AdaptiveKL, Divergence, known_divergences
from akl_lightning.errors import UsageError
from akl_lightning.projection import Logits, project_and_compare

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

    Logits have the precision in which the model's products run, all that follows has float32's at least. In float32,
    values are within ``1e-5 |value| + 1e-6`` of a dense float64 computation and gradients within 1e-5 of their norm; in
    bfloat16 logits are rounded to 3 digits, and gradients differ by some percent, as those of autograd do.

    Args:
        divergence: compares student and teacher at each response position.
        alpha: weight of the divergence, in [0, 1]; with 0 no teacher is needed (supervised fine-tuning).
        temperature: softens both distributions before they are compared; the divergence is scaled by its square.
            Cross entropy is not softened.
        ignore_index: label of the positions that are no response positions.
        chunk_size: tokens whose logits exist at a time; None for as many as have logits of 64 MiB. It changes speed and
            memory, not the result.
        compile_chunks: compile the comparison of a chunk with ``torch.compile``, as far as it compiles: the search of
            the head depends on the data. Without a compiler it warns once and goes on without.

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
        chunk_size: int | None = None,
        compile_chunks: bool = False,
    ) -> None:
        super().__init__()
        if not isinstance(divergence, Divergence):
            raise UsageError(f"unknown divergence {divergence!r}: use one of {', '.join(known_divergences())}.")
        if any(parameter.requires_grad for parameter in divergence.parameters()):
            raise UsageError(
                f"{type(divergence).__name__} has trainable parameters, which get no gradient: freeze them, or add "
                "their loss in the training step."
            )
        F.check_fraction("alpha", alpha)
        F.check_temperature(temperature)
        if chunk_size is not None and chunk_size < 1:
            raise UsageError(
                f"chunk_size must be 1 or more, got {chunk_size}: leave it out for one that fits the memory."
            )
        self.divergence = divergence
        self.alpha = alpha
        self.temperature = temperature
        self.ignore_index = ignore_index
        self.chunk_size = chunk_size
        self.compile_chunks = compile_chunks

    @property
    def needs_teacher(self) -> bool:
        """Whether the loss depends on a teacher."""
        return self.alpha > 0

    def response_positions(self, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Find the response positions, whose hidden states predict a labelled next token.

        Args:
            labels: ``[batch, length]``, not shifted; ``ignore_index`` where nothing is to be learnt.

        Returns:
            Indices of the positions in the flattened ``[batch, length]``, int64 ``[tokens]``, in order; and the labels
            that they predict, ``[tokens]``.
        """
        following = torch.nn.functional.pad(labels[:, 1:], (0, 1), value=self.ignore_index).flatten()
        positions = (following != self.ignore_index).nonzero().squeeze(-1)
        return positions, following[positions]

    def forward(self, student: Logits, teacher: Logits | None, labels: Tensor) -> CriterionOutput:
        """Compare at response positions.

        Args:
            student: logits ``[tokens, vocab]``, or hidden states and the head that projects them.
            teacher: likewise, or None with ``alpha = 0``.
            labels: ``[tokens]``, the tokens of the data.
        """
        if teacher is None and self.needs_teacher:
            raise UsageError(f"alpha = {self.alpha} needs a teacher: give one, or set alpha to 0.")
        return CriterionOutput(*project_and_compare(student, teacher, labels, self._loss_of_chunk, self.chunk_size))

    def _loss_of_chunk(self, *arguments: Any) -> dict[str, Tensor]:
        if self.compile_chunks:
            try:
                return _compiled()(self, *arguments)
            except TorchDynamoException as error:
                self.compile_chunks = False
                rank_zero_warn(f"compile_chunks is off, torch.compile found no working compiler: {error}")
        return self._chunk_loss(*arguments)

    def _chunk_loss(
        self, student: Tensor, teacher: Tensor | None, labels: Tensor, scratch: Tensor, with_gradient: bool
    ) -> dict[str, Tensor]:
        """Statistics of a few rows; ``student`` is overwritten with the gradient of their summed loss."""
        t, weight = self.temperature, 1.0 if teacher is None else 1 - self.alpha
        if teacher is None:
            log_q = F.log_probs(student)
            cross_entropy = -log_q.gather(-1, labels[:, None]).squeeze(-1)
            statistics = {"loss": cross_entropy, "cross_entropy": cross_entropy}
            if with_gradient:
                torch.exp(log_q, out=student)
        else:
            log_q = student if t == 1 else F.log_probs(student)
            softened = (student, teacher) if t == 1 else (student / t, teacher / t)
            # With a temperature of 1, student and log_q are the log-probabilities from here on.
            pair = F.compare(*softened, self.divergence.mu, self.divergence.head_rule, scratch)
            cross_entropy = -log_q.gather(-1, labels[:, None]).squeeze(-1)
            if with_gradient:
                value, gradient = self.divergence.value_and_gradient(pair)
            else:
                value = self.divergence.value(pair)
            divergence = t**2 * value
            # Not a plain sum: zero times infinity is zero here, a weight of 0 switches its part off.
            loss = F.weighted(self.alpha, divergence) + F.weighted(weight, cross_entropy)
            statistics = {"loss": loss, "divergence": divergence, "cross_entropy": cross_entropy}
            statistics |= {name: getattr(pair, name) for name in pair._fields if name in STATISTICS}
            statistics["head_weight"] = F.head_weight(pair.head_gap, pair.tail_gap)
            if with_gradient:
                # By the chain rule, t² times the divergence of logits / t has t times the gradient.
                q, gradient = (pair.student_probs, gradient) if t == 1 else (log_q.exp(), gradient.mul_(t))
                torch.lerp(gradient, q, weight, out=student)
        if with_gradient:
            # The rest of cross entropy's gradient, q - 1 at the label.
            student.scatter_add_(-1, labels[:, None], student.new_full((len(labels), 1), -weight))
        return statistics


@cache
def _compiled() -> Callable[..., dict[str, Tensor]]:
    # Not kept by the criterion, which has to be copied (SWA, EMA) and pickled.
    return torch.compile(DistillationCriterion._chunk_loss)
