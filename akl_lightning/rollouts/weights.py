"""The student as one whole model to sample from: itself where it can be, else a copy in the precision of the products.

Sharded weights are gathered once and not layer by layer for every token, and an adapter is merged, so that a token
costs what it costs in the finished model.
"""

import copy
import traceback
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from akl_lightning.models.lora import virtual_tokens
from akl_lightning.models.split import SplitModel
from akl_lightning.teachers.fingerprint import whole


class WholeModel:
    """Gives a model to sample from, with the weights of now.

    Args:
        student: may be sharded later, if :meth:`outline` is called before.
    """

    def __init__(self, student: SplitModel) -> None:
        self._student = student
        self._outline: nn.Module | None = None
        self._copy: SplitModel | None = None

    def outline(self) -> None:
        """Keep the layers without their weights, before they are sharded."""
        if self._outline is None:
            self._outline = _outline_of(self._student.model)

    def forget(self) -> None:
        """Free the copy, if there is one."""
        self._copy = None

    @torch.inference_mode(False)  # or what a validation has copied could not be written over in training
    @torch.no_grad()
    def now(self, dtype: torch.dtype | None) -> SplitModel:
        """The student with its weights of now; called on every rank where they are sharded.

        What fails on one rank fails there alone: it has met the others in all that they wait for.

        Args:
            dtype: of the products, or None for that of the weights.
        """
        parameters = list(self._student.model.parameters())
        sharded = any(isinstance(parameter, DTensor) for parameter in parameters) or self._outline is not None
        adapted, quantised = _mergeable(self._student.model), _is_quantised(self._student.model)
        narrower = dtype is not None and any(p.is_floating_point() and p.dtype != dtype for p in parameters)
        if not sharded and (quantised or not (adapted or narrower)):
            return self._student
        weights = self._weights()
        try:
            return self._filled(weights, dtype, adapted)
        except Exception as error:
            self.forget()
            traceback.clear_frames(error.__traceback__)  # which hold what was copied, and memory may be short
            for _ in weights:  # the other ranks wait for this one in each
                pass
            raise

    def _weights(self) -> Iterator[tuple[str, Tensor]]:
        """Each weight by its name, whole; tied ones under each of their names."""
        for name, parameter in self._student.model.named_parameters(remove_duplicate=False):
            yield name, whole(parameter.detach())

    def _filled(self, weights: Iterator[tuple[str, Tensor]], dtype: torch.dtype | None, adapted: bool) -> SplitModel:
        # An adapter is merged in the weights' own precision, and rounded once.
        target: Any = self._copy
        if target is None or adapted:
            target = self._empty(None if adapted else dtype, adapted)
        own = dict(target.model.named_parameters())
        for name, weight in weights:
            if name in own:  # of tied ones the first
                own[name].copy_(weight)
        if adapted:
            target = SplitModel(target.model.merge_and_unload().to(dtype))
        if self._copy is None:
            self._copy = target.eval()
        elif target is not self._copy:  # in place, for whoever has noted where they lie
            for old, new in zip(self._copy.model.parameters(), target.model.parameters(), strict=True):
                old.copy_(new)
        return self._copy

    def _empty(self, dtype: torch.dtype | None, apart: bool) -> SplitModel:
        """A copy whose weights are yet to be filled in: the memory that all of it takes, before any is gathered.

        Args:
            dtype: of floating-point weights; None for their own.
            apart: give tied weights each their own, as an adapter of the head is merged without the embedding.
        """
        model = self._student.model
        largest = max(model.parameters(), key=Tensor.numel)
        outline = _outline_of(model) if self._outline is None else copy.deepcopy(self._outline)
        own: dict[str | int, nn.Parameter] = {}
        for name, old in model.named_parameters(remove_duplicate=False):
            key = name if apart else id(old)
            if key not in own:
                kind = dtype if dtype is not None and old.is_floating_point() else old.dtype
                own[key] = nn.Parameter(torch.empty(old.shape, dtype=kind, device=old.device), requires_grad=False)
            parent, _, last = name.rpartition(".")
            setattr(outline.get_submodule(parent), last, own[key])
        torch.empty(largest.shape, dtype=largest.dtype, device=largest.device)  # room for what is gathered beside it
        return SplitModel(outline.to(largest.device))


def _outline_of(model: nn.Module) -> nn.Module:
    """A copy of a model whose parameters are on the meta device, where they take no memory; buffers are copied."""
    empty: dict[int, Any] = {
        id(parameter): nn.Parameter(torch.empty_like(parameter, device="meta"), requires_grad=False)
        for parameter in model.parameters()
    }
    return copy.deepcopy(model, empty).eval()


def _mergeable(model: Any) -> bool:
    """Whether an adapter can become part of the weights; a learnt prompt cannot."""
    return hasattr(model, "peft_config") and hasattr(model, "merge_and_unload") and not virtual_tokens(model)


def _is_quantised(model: Any) -> bool:
    return any(getattr(part, "is_quantized", False) for part in model.modules())
