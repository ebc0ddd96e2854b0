"""What of a batch a model is given beside its tokens, and where the tokens stand."""

import inspect
from collections.abc import Callable, Mapping
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from akl_lightning.errors import UsageError

OURS = frozenset(
    (
        "input_ids", "attention_mask", "labels", "index", "turn", "response", "layout", "packed", "cached", "rollouts",
        "teacher_input_ids", "teacher_attention_mask", "teacher_labels", "teacher_turn", "aligned", "of_teacher",
        "places", "is_aligned", "bytes",
    )
)  # fmt: skip
"""Entries of a batch that the package knows or adds."""

CONTENT = frozenset(
    (
        "position_ids", "inputs_embeds", "pixel_values", "pixel_values_images", "pixel_values_videos", "input_features",
        "input_values", "audio_values", "audio_features", "encoder_hidden_states", "encoder_outputs", "seq_idx",
        "cu_seq_lens_q", "cu_seq_lens_k",
    )
)  # fmt: skip
"""Entries that say what a sample is, or what its tokens see: a model that does not know them would see another one."""

_NEVER = frozenset(
    (
        "inputs_embeds", "past_key_values", "cache", "cache_position", "use_cache", "logits_to_keep", "return_dict",
        "output_attentions", "output_hidden_states", "output_router_logits",
    )
)  # fmt: skip
"""What a forward knows and no batch may decide: caches, outputs, and embeddings, whose width is one model's own."""


class Layout(NamedTuple):
    """Where the tokens of a batch stand."""

    position_ids: Tensor | None
    """``[batch, length]``, counted from the mask; None where a model's own count is right, or the batch's is given."""

    segments: Tensor | None
    """``[batch, length]``: consecutive within a sample and nowhere else, where a row holds several; else None."""


def lay_out(batch: Mapping[str, Any]) -> Layout:
    """Count positions from the mask behind padding, and tell samples apart in a row whose positions begin anew.

    Args:
        batch: ``attention_mask`` and perhaps ``position_ids``, each ``[batch, length]``.

    >>> lay_out({"attention_mask": torch.tensor([[0, 1, 1], [1, 1, 0]])}).position_ids.tolist()
    [[0, 0, 1], [0, 1, 1]]
    >>> mask, positions = torch.ones(1, 4, dtype=torch.int64), torch.tensor([[0, 1, 0, 1]])
    >>> lay_out({"attention_mask": mask, "position_ids": positions}).segments.tolist()
    [[2, 3, 6, 7]]
    """
    mask = batch["attention_mask"].bool()
    positions = batch.get("position_ids")
    if mask.dim() != 2:  # what a module of the user's own makes of
        return Layout(None, None)
    if positions is None:
        # Padding behind the tokens leaves a model's own count as it is; images have a count of their own.
        if not (mask[:, 1:] & ~mask[:, :-1]).any() or CONTENT & batch.keys():
            return Layout(None, None)
        return Layout((mask.cumsum(-1) - 1).clamp(min=0), None)
    if positions.shape != mask.shape:  # of several axes, as for images: the model's own
        return Layout(None, None)
    rows, own = mask.nonzero()[:, 0], positions[mask]
    if not ((own.diff() != 1) & (rows.diff() == 0)).any():
        return Layout(None, None)
    begins = mask.clone()
    begins[:, 1:] &= ~mask[:, :-1] | (positions.diff() != 1)
    return Layout(None, torch.arange(mask.shape[1], device=mask.device) + 2 * begins.cumsum(-1))


def known_inputs(model: Any) -> frozenset[str]:
    """What the forward of a ``transformers`` model and of its body take from a batch, by name."""
    return (_parameters(type(model).forward) & _parameters(type(model.base_model).forward)) - _NEVER - OURS


def check_inputs(model: Any, batch: Mapping[str, Any], role: str, packing: bool) -> None:
    """Raise :class:`UsageError` for what a batch carries and a ``transformers`` model could not be given.

    What neither its forward knows nor :data:`CONTENT` names (an index, a text, a weight) is left alone.

    Args:
        model: the language model.
        batch: as a DataLoader gives it.
        role: what a message calls the model.
        packing: whether samples will be laid into fewer rows.
    """
    kind, known = type(model).__name__, known_inputs(model)
    for name in batch.keys() - OURS:
        if name not in known and (name in CONTENT or name in _parameters(type(model).forward)):
            raise UsageError(
                f"the batch has {name!r}, which the {role}, {kind}, cannot be given: leave it out of the batch, or "
                "take a model that knows it."
            )
        if name in known and packing:
            raise UsageError(
                f"model.packing lays samples into rows by itself and cannot move {name!r} of the batch along: set "
                "model.packing to false, or leave it out."
            )
    if batch["attention_mask"].shape != batch["input_ids"].shape:
        raise UsageError(
            f"the batch has an attention_mask of shape {list(batch['attention_mask'].shape)} with input_ids of shape "
            f"{list(batch['input_ids'].shape)}: give one of [batch, length]; samples that share a row are told apart "
            "by position_ids that begin anew."
        )


@lru_cache
def _parameters(forward: Callable[..., Any]) -> frozenset[str]:
    return frozenset(inspect.signature(forward).parameters)
