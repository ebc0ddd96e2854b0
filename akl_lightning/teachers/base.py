"""What the module asks of a teacher, wherever its distributions come from."""

from abc import ABC, abstractmethod
from typing import Any, Self

import torch
from lightning.pytorch import Trainer
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from transformers import PreTrainedTokenizerBase

from akl_lightning.batch import Batch
from akl_lightning.criterion import DistillationCriterion
from akl_lightning.projection import Logits


class Teacher(ABC):
    """Gives the teacher's logits at response positions, without gradients.

    It is no module on purpose: whoever walks over the student's module (optimizers, checkpoints, parameter counts,
    gradient synchronisation, deep copies of SWA and EMA) never meets it.
    """

    fingerprint: str | None = None
    """What tells the teacher's weights from others, or None where they are not looked at; goes into checkpoints."""

    longest: int | None = None
    """Tokens of the longest text that it has positions for, or None where that has no bound."""

    @property
    @abstractmethod
    def vocab_size(self) -> int | None:
        """Number of outputs, padding included, or None where it is not known."""

    @property
    def num_parameters(self) -> int | None:
        """How many parameters it has, or None where that is not known."""
        return None

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase | None:
        """Its own, or None where it has none beside it."""
        return None

    @property
    def description(self) -> str:
        """What it is, in a few words, for summaries and model cards."""
        return type(self).__name__

    def prepare(self, batch: Batch, positions: Tensor) -> dict[str, Any]:
        """What a batch is to carry for :meth:`__call__`, found before the batch goes to the device.

        Args:
            batch: ``input_ids`` and ``attention_mask``, each ``[batch, length]``, on the host.
            positions: of the response tokens, as in :meth:`__call__`.

        Returns:
            More entries of the batch, which go to the device with it.
        """
        return {}

    @abstractmethod
    def __call__(self, batch: Batch, positions: Tensor) -> Logits:
        """Logits ``[tokens, vocab]``, or what gives them, without gradient.

        The weights of the head stay at hand until :meth:`release`, however they are sharded.

        Args:
            batch: ``input_ids`` and ``attention_mask``, each ``[batch, length]``, and what :meth:`prepare` has given.
            positions: indices into the flattened batch, ``[tokens]``.
        """

    def release(self) -> None:  # noqa: B027
        """Free what :meth:`__call__` has gathered from other devices."""

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
