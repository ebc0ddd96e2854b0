"""What looks at validation samples: at the same ones after every epoch, spread over the split."""

from typing import Any, NamedTuple

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor

from akl_lightning.callbacks.checks import require_logger, require_teacher, require_tokenizer
from akl_lightning.data.spread import spread_over_validation
from akl_lightning.errors import check_count
from akl_lightning.module import DistillationModule


class Row(NamedTuple):
    """A sample of a batch that has response tokens."""

    number: int
    """Of the sample in the batch."""

    positions: Tensor
    """Where its response positions are, ``[tokens]``, ascending."""

    labels: Tensor
    """What they predict, ``[tokens]``."""

    within: slice
    """Where its tokens are among those of the batch, in the per-token statistics."""


class SampleCallback(Callback):
    """Looks at some samples in every validation while training, for the loggers.

    Args:
        answers: how many.

    Raises:
        UsageError: no teacher where one is needed, no tokenizer or no logger.
    """

    needs_teacher = True

    def __init__(self, answers: int = 4) -> None:
        check_count("answers", answers)
        self.answers = answers
        self.found: list[Any] = []
        """What was seen in this validation."""

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Check that there is something to see, and somewhere to log it."""
        if stage == "fit":
            if self.needs_teacher:
                require_teacher(self, pl_module)
            require_tokenizer(self, pl_module)
            require_logger(self, trainer)

    def on_validation_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Begin anew."""
        self.found.clear()

    def on_validation_batch_end(
        self,
        trainer: Trainer,
        pl_module: DistillationModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Look at this batch's share of the samples, on every rank alike; at none in a sanity check."""
        wanted = spread_over_validation(trainer, batch_idx, dataloader_idx, self.answers)
        if wanted and trainer.state.fn == "fit":
            self.look_at(trainer, pl_module, outputs, batch, wanted)

    def look_at(self, trainer: Trainer, module: DistillationModule, outputs: Any, batch: Any, wanted: int) -> None:
        """Look at so many samples of a batch; called on every rank, with or without a response in it."""
        raise NotImplementedError


def response_rows(module: DistillationModule, batch: Any) -> list[Row]:
    """The samples of a batch that have response tokens."""
    positions, labels = batch.get("response") or module.criterion.response_positions(batch["labels"])
    length = batch["labels"].shape[1]
    rows, start = [], 0
    for number, count in enumerate(torch.bincount(positions // length, minlength=len(batch["labels"])).tolist()):
        if count:
            within = slice(start, start + count)
            rows.append(Row(number, positions[within] % length, labels[within], within))
            start += count
    return rows


def read_until(batch: Any, row: Row, place: int = 0) -> Tensor:
    """What is read of a sample until one of its response positions, the first unless it is said otherwise, ``[n]``."""
    until = row.positions[place] + 1
    return batch["input_ids"][row.number, :until][batch["attention_mask"][row.number, :until].bool()]
