"""What the module asks of a teacher, wherever its distributions come from."""

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any, Self, TypeVar

import torch
from lightning.pytorch import Trainer
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from transformers import PreTrainedTokenizerBase

from akl_lightning.criterion import DistillationCriterion
from akl_lightning.models import Batch
from akl_lightning.projection import Logits

Result = TypeVar("Result")


class Teacher(ABC):
    """Gives the teacher's logits at response positions, without gradients.

    It is no module on purpose: whoever walks over the student's module (optimizers, checkpoints, parameter counts,
    gradient synchronisation, deep copies of SWA and EMA) never meets it.
    """

    @property
    @abstractmethod
    def vocab_size(self) -> int | None:
        """Number of outputs, padding included, or None where it is not known."""

    @property
    def description(self) -> str:
        """What it is, in a few words, for summaries and model cards."""
        return type(self).__name__

    @property
    def parameters(self) -> int | None:
        """How many parameters it has, or None where that is not known."""
        return None

    @property
    def fingerprint(self) -> str | None:
        """What tells the teacher's weights from others, or None where they are not looked at; goes into checkpoints."""
        return None

    @abstractmethod
    def __call__(self, batch: Batch, positions: Tensor, consume: Callable[[Logits], Result]) -> Result:
        """Hand logits ``[tokens, vocab]``, or what gives them, to ``consume`` and return what it returns.

        ``consume`` is called under ``no_grad``, while the weights of the head are at hand; it turns gradients on again
        for what is its own.

        Args:
            batch: ``input_ids`` and ``attention_mask``, each ``[batch, length]``.
            positions: boolean ``[batch, length]``.
            consume: takes the logits.
        """

    def load(self, mesh: DeviceMesh | None) -> None:  # noqa: B027
        """Read the weights, if that is not done yet, before a run.

        Args:
            mesh: devices to shard them over, so that none holds the whole of them; or None.
        """

    @abstractmethod
    def to(self, device: torch.device) -> Self:
        """Move to the device, unless it is the meta device, where weights would be lost."""

    @abstractmethod
    def check_fits(self, name: str, tokenizer: PreTrainedTokenizerBase | None, max_length: int | None) -> None:
        """Raise :class:`UsageError` unless the teacher goes with the data; see :meth:`SplitModel.check_fits`."""

    def check_run(self, stage: str, trainer: Trainer, criterion: DistillationCriterion) -> None:  # noqa: B027
        """Raise :class:`UsageError` if the teacher cannot serve a run that is about to start."""

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        return self
