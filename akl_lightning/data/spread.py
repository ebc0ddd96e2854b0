"""Few samples out of many, evenly."""

import math
from typing import Any

from lightning.pytorch import Trainer


def spread(index: int, places: int, wanted: int) -> int:
    """Of so many things that are spread evenly over some places, how many fall to the one with this index.

    >>> [spread(index, 10, 3) for index in range(10)], spread(0, 1, 3)
    ([0, 1, 0, 0, 1, 0, 0, 0, 1, 0], 3)
    """
    return (2 * (index + 1) * wanted + places) // (2 * places) - (2 * index * wanted + places) // (2 * places)


def spread_over_validation(trainer: Trainer, batch_idx: int, dataloader_idx: int, wanted: int) -> int:
    """How many samples of a batch are looked at, of so many in a validation's first set; none in a sanity check."""
    if trainer.sanity_checking or dataloader_idx:
        return 0
    batches: Any = trainer.num_val_batches
    count = batches[0] if isinstance(batches, list) else batches
    # The split may be sorted by length.
    return spread(batch_idx, wanted if math.isinf(count) else int(count), wanted)
