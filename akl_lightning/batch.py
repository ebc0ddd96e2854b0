"""What a batch holds, and what is found from it before it goes to a device that would have to be waited for."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

from torch import Tensor

from akl_lightning.errors import UsageError

if TYPE_CHECKING:
    from akl_lightning.criterion import DistillationCriterion

Batch = Mapping[str, Any]
"""``input_ids``, ``attention_mask`` and, but for prompts, ``labels``, each ``[batch, length]``; and what
:meth:`akl_lightning.module.DistillationModule.prepare_batch` adds to them."""

KEYS = ("input_ids", "attention_mask", "labels")
"""What a batch to learn from has to hold."""


class Response(NamedTuple):
    """Where a batch's response tokens are predicted, and what they are."""

    positions: Tensor
    """Indices into the flattened batch, ``[tokens]``, int64."""

    labels: Tensor
    """The tokens of the data there, ``[tokens]``."""


def response_of(batch: Batch, criterion: "DistillationCriterion") -> Response:
    """Where the response tokens of a batch are.

    Raises:
        UsageError: one of :data:`KEYS` is missing.
    """
    for key in KEYS:
        if key not in batch:
            raise UsageError(f"the batch has no {key!r}, only {list(batch)}: let the DataLoader yield all three.")
    return Response(*criterion.response_positions(batch["labels"]))


def turns_of(batch: Batch, criterion: "DistillationCriterion") -> dict[str, Tensor]:
    """``turn``: the number of the assistant's turn that each response token belongs to, ``[tokens]``, from 0.

    Nothing where the batch has no ``turn`` ``[batch, length]``, as of plain prompts and responses.
    """
    if "turn" not in batch:
        return {}
    response = batch["response"] if "response" in batch else response_of(batch, criterion)
    return {"turn": batch["turn"].flatten()[response.positions + 1]}  # positions are those before the tokens
