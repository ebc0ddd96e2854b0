"""Rows of a tokenized split, and how they become a batch."""

from typing import Any

import datasets
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from akl_lightning.data.sampler import FILLER

IGNORE_INDEX = -100
"""Label of what is not to be learnt."""

Row = dict[str, Any]
"""``prompt_ids`` and ``response_ids``, lists of tokens, and ``index``, the number of the sample in its split."""


class Rows(torch.utils.data.Dataset):
    """Rows of a split by index, and an empty one for the filler."""

    def __init__(self, data: datasets.Dataset) -> None:
        self.data = data

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, index: int) -> Row:
        row = {"prompt_ids": [], "response_ids": []} if index == FILLER else self.data[index]
        return {**row, "index": index}


def collate(rows: list[Row], pad_id: int) -> dict[str, Tensor]:
    """``input_ids``, ``attention_mask`` and ``labels``, each ``[batch, length]``, padded on the right; and ``index``.

    Args:
        rows: samples; one without a prompt gets a padding token for it.
        pad_id: the padding token.

    >>> collate([{"prompt_ids": [5], "response_ids": [6, 7], "index": 0}], 0)["labels"]
    tensor([[-100,    6,    7]])
    """
    prompts = [row["prompt_ids"] or [pad_id] for row in rows]
    whole = [prompt + row["response_ids"] for prompt, row in zip(prompts, rows, strict=True)]
    labels = [[IGNORE_INDEX] * len(prompt) + row["response_ids"] for prompt, row in zip(prompts, rows, strict=True)]
    return {
        "input_ids": _pad(whole, pad_id, "right"),
        "attention_mask": _pad([[1] * len(row) for row in whole], 0, "right"),
        "labels": _pad(labels, IGNORE_INDEX, "right"),
        "index": torch.tensor([row["index"] for row in rows]),
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
