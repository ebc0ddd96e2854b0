"""Which validation samples are looked at: the same ones after every epoch, spread over the split."""

import math
from typing import Any, NamedTuple

import torch
from lightning.pytorch import Trainer
from torch import Tensor

from akl_lightning.data.spread import spread
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


def wanted_of_batch(trainer: Trainer, batch_idx: int, dataloader_idx: int, wanted: int) -> int:
    """How many samples to take of a validation batch, on every rank alike, for so many in all of the split.

    None outside of training and in a sanity check. The split may be sorted by length, so they are spread over it.
    """
    if trainer.state.fn != "fit" or trainer.sanity_checking or dataloader_idx:
        return 0
    batches: Any = trainer.num_val_batches
    count = batches[0] if isinstance(batches, list) else batches
    return spread(batch_idx, wanted if math.isinf(count) else int(count), wanted)


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
