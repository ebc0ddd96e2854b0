"""The samples of a batch in fewer rows, one after another, instead of one to a row with padding behind it."""

from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor


class Packed(NamedTuple):
    """What :func:`pack` returns."""

    input_ids: Tensor
    """``[rows, width]``, where width is the length of the longest sample."""

    position_ids: Tensor
    """``[rows, width]``; they begin at 0 with each sample, which is how ``transformers`` tells samples apart."""

    places: Tensor
    """``[batch, length]``: where each token of the batch is in the flattened rows; 0 for padding."""

    mask: Tensor
    """``[rows, width]``: 1 where a token is."""


def pack(batch: Mapping[str, Tensor]) -> Packed:
    """Lay the longest samples first, each into the first row that has room for it.

    Args:
        batch: ``input_ids`` and ``attention_mask``, each ``[batch, length]``.

    >>> ids, mask = torch.tensor([[5, 6, 0], [1, 2, 3], [4, 0, 0]]), torch.tensor([[1, 1, 0], [1, 1, 1], [1, 0, 0]])
    >>> packed = pack({"input_ids": ids, "attention_mask": mask})
    >>> packed.input_ids.tolist(), packed.position_ids.tolist()
    ([[1, 2, 3], [5, 6, 4]], [[0, 1, 2], [0, 1, 0]])
    >>> packed.input_ids.flatten()[packed.places][0]
    tensor([5, 6, 1])
    """
    mask = batch["attention_mask"].bool()
    lengths = mask.sum(-1).tolist()
    width = max(1, *lengths)
    filled: list[int] = []
    starts = [0] * len(lengths)
    for sample in sorted(range(len(lengths)), key=lambda sample: -lengths[sample]):
        row = next((row for row, used in enumerate(filled) if used + lengths[sample] <= width), len(filled))
        filled += [0] * (row == len(filled))
        starts[sample] = row * width + filled[row]
        filled[row] += lengths[sample]
    positions = mask.cumsum(-1) - 1
    places = (torch.tensor(starts, device=mask.device)[:, None] + positions).where(mask, 0)
    ids, position_ids, tokens = batch["input_ids"].new_zeros(3, len(filled) * width)
    ids[places[mask]] = batch["input_ids"][mask]
    position_ids[places[mask]] = positions[mask]
    tokens[places[mask]] = 1
    return Packed(ids.view(-1, width), position_ids.view(-1, width), places, tokens.view(-1, width))
