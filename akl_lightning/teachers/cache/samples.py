"""What tells a sample from others: its content, whatever batch, order or split it comes in."""

import hashlib
from collections.abc import Collection

import numpy as np
import torch
from torch import Tensor

from akl_lightning.batch import Batch
from akl_lightning.errors import UsageError
from akl_lightning.models.inputs import CONTENT, OURS

UNRECORDED_INPUTS = CONTENT | {"token_type_ids"}
"""What a cache that does not say what its teacher was given has not been given for certain."""

DIGEST = "S16"
"""A sample's digest to numpy, which sorts and finds them; a shard has it as two integers."""


def sample_digests(batch: Batch, positions: Tensor, inputs: Collection[str] | None = ()) -> list[bytes]:
    """16 bytes per row that stand for its tokens and for which of them are response positions; padding has no part.

    What else the teacher is given of a batch has its part where it is there.

    Args:
        batch: ``input_ids`` and ``attention_mask``, each ``[batch, length]``.
        positions: indices into the flattened batch, ``[tokens]``.
        inputs: names of what else the teacher is given; None for all that is there.

    Raises:
        UsageError: something of which nobody can tell to which row it belongs.

    >>> ids, mask = torch.tensor([[5, 6, 0], [0, 5, 6]]), torch.tensor([[1, 1, 0], [0, 1, 1]])
    >>> one, two = sample_digests({"input_ids": ids, "attention_mask": mask}, torch.tensor([0, 4]))
    >>> one == two
    True
    """
    marked = 2 * batch["input_ids"].long()
    marked.view(-1)[positions] += 1
    marked = marked.cpu().numpy().astype("<i8")
    masks = batch["attention_mask"].bool().cpu().numpy()
    hashes = [hashlib.blake2b(row[mask].tobytes(), digest_size=16) for row, mask in zip(marked, masks, strict=True)]
    for name in sorted(batch.keys() - OURS):
        if isinstance(value := batch[name], Tensor) and (inputs is None or name in inputs):
            for sample, rows in zip(hashes, _rows(name, value, masks), strict=True):
                sample.update(f"{name} {list(rows.shape[1:])}".encode() + rows.tobytes())
    return [sample.digest() for sample in hashes]


def _rows(name: str, value: Tensor, masks: np.ndarray) -> list[np.ndarray]:
    """What of an entry of the batch belongs to each of its samples."""
    samples, length = masks.shape
    content = (value.double() if value.is_floating_point() else value.long()).cpu().numpy()
    if content.shape[:2] == (samples, length):
        return [row[mask] for row, mask in zip(content, masks, strict=True)]
    if content.shape == (samples,):
        return list(content[:, None])
    if samples > 1:
        raise UsageError(
            f"nobody can tell which part of {name!r}, of shape {list(value.shape)}, belongs to which of the {samples} "
            "samples of the batch, by which a teacher's cache is kept: give batches of one sample."
        )
    return [content]


def tokens_per_sample(batch: Batch, positions: Tensor) -> list[int]:
    """How many response tokens each sample of a batch has.

    >>> tokens_per_sample({"input_ids": torch.zeros(2, 3)}, torch.tensor([0, 4, 5]))
    [1, 2]
    """
    samples, length = batch["input_ids"].shape
    return torch.bincount(positions // length, minlength=samples).tolist()
