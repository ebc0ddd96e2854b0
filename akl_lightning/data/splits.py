"""Which records are trained on, and which are held out."""

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING

import numpy as np

from akl_lightning.errors import UsageError

if TYPE_CHECKING:
    import datasets


def split_records(
    records: "Mapping[str, datasets.Dataset]", validation_size: int | float, test_size: int | float
) -> "dict[str, datasets.Dataset]":
    """Fill the missing splits from the training records, by a hash of each record's name or prompt.

    Args:
        records: under ``train``, and perhaps under ``validation`` and ``test``; or under ``test`` alone.
        validation_size: a number (int) or a share (float) of the training records.
        test_size: likewise.

    Returns:
        All three splits; which record goes where depends on nothing but its name or prompt and, for numbers, on its
        peers.

    Raises:
        UsageError: a size below 0, nothing would be left to train on, or the records are streamed.
    """
    import datasets

    from akl_lightning.data.store import RECORD_FEATURES

    check_sizes(validation_size, test_size)
    splits = dict(records)
    for split, data in splits.items():
        if not isinstance(data, datasets.Dataset):
            raise UsageError(
                f"the source gives its {split} records as {type(data).__name__}, but splits, lengths and the order "
                "of an epoch need all of them: load them without streaming."
            )
    nothing = datasets.Dataset.from_dict({name: [] for name in RECORD_FEATURES}, RECORD_FEATURES)
    if "train" not in splits:  # a test set
        return {"train": nothing, "validation": nothing, **splits}
    train = splits["train"]
    of_records = keys(train)
    order = np.argsort(of_records, kind="stable")
    used = 0
    for split, size in (("validation", validation_size), ("test", test_size)):
        if split not in splits:
            number = size if isinstance(size, int) else round(size * len(order))
            if number and isinstance(size, float):  # answers to one prompt stay together
                last = of_records[order[min(used + number, len(order)) - 1]]
                number = int(np.searchsorted(of_records[order], last, side="right")) - used
            splits[split] = train.select(order[used : used + number])
            used += number
    if used >= len(order):
        raise UsageError(
            f"{used} validation and test samples leave none of {len(order)} to train on: lower data.validation_size "
            f"and data.test_size, here {validation_size} and {test_size}."
        )
    splits["train"] = train.select(np.sort(order[used:])) if used else train
    return splits


def keys(records: "datasets.Dataset") -> np.ndarray:
    """``[records]`` uint64: what the split goes by, the first bytes of a SHA-256."""
    return records.select_columns("key").with_format("arrow")[:]["key"].to_numpy()


def check_sizes(validation_size: int | float, test_size: int | float) -> None:
    """Raise :class:`UsageError` unless both are a number of samples or a share of them."""
    for name, size in (("validation_size", validation_size), ("test_size", test_size)):
        if not 0 <= size < math.inf:  # which nan is not, either
            raise UsageError(f"data.{name} must be a number of samples or a share of them, 0 or more, got {size}.")
