"""What a batch holds, and what is found from it before it goes to a device that would have to be waited for."""

import warnings
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


_TEACHER = "teacher_"

OF_TEACHER = ("teacher_input_ids", "teacher_attention_mask", "teacher_labels", "teacher_turn", "aligned")
"""What more a batch holds for a teacher with another tokenizer."""


def teacher_side(batch: Batch) -> dict[str, Any]:
    """What of a batch a teacher with another tokenizer reads; the batch itself where it has nothing of the kind.

    Args:
        batch: perhaps with ``teacher_input_ids``, ``teacher_attention_mask`` and ``teacher_labels``, each
            ``[batch, teacher's length]``.

    >>> sorted(teacher_side({"input_ids": 1, "teacher_input_ids": 2, "teacher_labels": 3, "index": 4}).items())
    [('index', 4), ('input_ids', 2), ('labels', 3)]
    """
    own = {name.removeprefix(_TEACHER): value for name, value in batch.items() if name.startswith(_TEACHER)}
    if not own:
        return dict(batch)
    return own | ({"index": batch["index"]} if "index" in batch else {})


def expect_transfer_hook() -> None:
    """Keep from users Lightning's advice that a module's ``on_before_batch_transfer`` is taken, not their data's."""
    warnings.filterwarnings("ignore", message=".*overridden `on_before_batch_transfer` in `LightningModule` but")


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
