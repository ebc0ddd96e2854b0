"""Rows of a tokenized split, and how they become a batch."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from akl_lightning.data.sampler import FILLER
from akl_lightning.tokenizers.alignment import NONE

if TYPE_CHECKING:
    import datasets

IGNORE_INDEX = -100
"""Label of what is not to be learnt."""

NO_TURN = -1
"""Turn of what is not to be learnt."""

LEARNT = ("input_ids", "spans", "turns")
"""Columns of a batch to learn from."""

TEACHER = ("teacher_input_ids", "teacher_spans", "teacher_turns", "aligned")
"""What more a batch has for a teacher with another tokenizer."""

PROMPTS = ("prompt_ids",)
"""Columns of a batch of prompts."""

Row = dict[str, Any]
"""Tokens of a row, :data:`LEARNT` or :data:`PROMPTS`, and ``index``, its number in its split."""


class Rows(torch.utils.data.Dataset):
    """Rows of a split by index, and an empty one for the filler.

    Args:
        data: the split.
        columns: what is needed of a row.
        among: the samples of the split that it is about; None for all.
    """

    def __init__(self, data: "datasets.Dataset", columns: Sequence[str], among: Sequence[int] | None = None) -> None:
        self.data = data.select_columns(list(columns))
        self.columns = columns
        self.among = range(len(data)) if among is None else among

    def __len__(self) -> int:
        return len(self.among)

    def __getitem__(self, place: int) -> Row:
        if place == FILLER:
            return {**{name: [] for name in self.columns}, "index": FILLER}
        index = int(self.among[place])
        return {**self.data[index], "index": index}


def column(rows: "datasets.Dataset", name: str) -> np.ndarray:
    """A column of numbers, or of texts, as an array."""
    return rows.select_columns(name).with_format("arrow")[:][name].to_numpy()


def collate(rows: list[Row], pad_id: int) -> dict[str, Tensor]:
    """A batch to learn from, padded on the right.

    Args:
        rows: :data:`LEARNT` of samples, and perhaps :data:`TEACHER`; one without any token gets a padding token.
        pad_id: the padding token.

    Returns:
        ``input_ids``, ``attention_mask``, ``labels`` and ``turn``, each ``[batch, length]``; and ``index`` ``[batch]``.
        ``turn`` is the number of the assistant's turn that a learnt token belongs to, -1 elsewhere.
        For a teacher with another tokenizer, ``teacher_input_ids``, ``teacher_attention_mask``, ``teacher_labels`` and
        ``teacher_turn``, each ``[batch, teacher's length]``, and ``aligned`` ``[batch, length]``: for each learnt token
        the place of the teacher's in its row, -1 where there is none.

    >>> batch = collate([{"input_ids": [5, 6, 7, 8, 9], "spans": [1, 2, 4, 5], "turns": [0, 1], "index": 0}], 0)
    >>> batch["labels"]
    tensor([[-100,    6, -100, -100,    9]])
    >>> batch["turn"]
    tensor([[-1,  0, -1, -1,  1]])
    """
    batch = _learnt(rows, "", pad_id)
    batch["index"] = torch.tensor([row["index"] for row in rows])
    if "aligned" in rows[0]:
        batch |= _learnt(rows, "teacher_", 0)  # padding, which nothing sees
        batch["aligned"] = torch.full_like(batch["labels"], NONE)
        places = [place for row in rows for place in row["aligned"]]
        batch["aligned"][batch["labels"] != IGNORE_INDEX] = torch.tensor(places, dtype=torch.long)
    return batch


def _learnt(rows: list[Row], whose: str, pad_id: int) -> dict[str, Tensor]:
    """Tokens of one side, and which of them are learnt in which turn."""
    ids = [row[f"{whose}input_ids"] or [pad_id] for row in rows]
    labels, turns = [[IGNORE_INDEX] * len(row) for row in ids], [[NO_TURN] * len(row) for row in ids]
    for number, row in enumerate(rows):
        spans = row[f"{whose}spans"]
        for start, end, turn in zip(spans[::2], spans[1::2], row[f"{whose}turns"], strict=True):
            labels[number][start:end] = ids[number][start:end]
            turns[number][start:end] = [turn] * (end - start)
    return {
        f"{whose}input_ids": _pad(ids, pad_id, "right"),
        f"{whose}attention_mask": _pad([[1] * len(row) for row in ids], 0, "right"),
        f"{whose}labels": _pad(labels, IGNORE_INDEX, "right"),
        f"{whose}turn": _pad(turns, NO_TURN, "right"),
    }


def collate_prompts(rows: list[Row], pad_id: int) -> dict[str, Tensor]:
    """``input_ids`` and ``attention_mask`` of the prompts alone, padded on the left; and ``index``."""
    prompts = [row["prompt_ids"] or [pad_id] for row in rows]
    return {
        "input_ids": _pad(prompts, pad_id, "left"),
        "attention_mask": _pad([[1] * len(prompt) for prompt in prompts], 0, "left"),
        "index": torch.tensor([row["index"] for row in rows]),
    }


def _pad(rows: list[list[int]], value: int, side: str) -> Tensor:
    tensors = [torch.tensor(row, dtype=torch.long) for row in rows]
    return pad_sequence(tensors, batch_first=True, padding_value=value, padding_side=side)
