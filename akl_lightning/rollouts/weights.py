"""The student as one whole model to sample from: itself where it can be, else a copy in the precision of the products.

Sharded weights are gathered once and not layer by layer for every token, and an adapter is merged, so that a token
costs what it costs in the finished model.
"""

import copy
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from akl_lightning.models.lora import virtual_tokens
from akl_lightning.models.split import SplitModel


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

        Args:
            dtype: of the products, or None for that of the weights.
        """
        parameters = list(self._student.model.parameters())
        sharded = any(isinstance(parameter, DTensor) for parameter in parameters) or self._outline is not None
        adapted, quantised = _mergeable(self._student.model), _is_quantised(self._student.model)
        narrower = dtype is not None and any(p.is_floating_point() and p.dtype != dtype for p in parameters)
        if not sharded and (quantised or not (adapted or narrower)):
            return self._student
        if self._copy is None or adapted:
            fresh = self._filled(dtype, adapted)
            if self._copy is None:
                self._copy = SplitModel(fresh).eval()
            else:  # in place, for whoever has noted where they lie
                for own, new in zip(self._copy.model.parameters(), fresh.parameters(), strict=True):
                    own.copy_(new)
        else:
            own = dict(self._copy.model.named_parameters())
            for name, weight in self._weights():
                if name in own:  # of tied ones the first
                    own[name].copy_(weight)
        return self._copy

    def _weights(self) -> Iterator[tuple[str, Tensor]]:
        """Each weight by its name, whole; tied ones under each of their names."""
        for name, parameter in self._student.model.named_parameters(remove_duplicate=False):
            yield name, parameter.full_tensor() if isinstance(parameter, DTensor) else parameter.detach()

    def _filled(self, dtype: torch.dtype | None, adapted: bool) -> nn.Module:
        outline = _outline_of(self._student.model) if self._outline is None else copy.deepcopy(self._outline)
        ids = {name: id(p) for name, p in self._student.model.named_parameters(remove_duplicate=False)}
        # An adapter is merged in the weights' own precision, and rounded once.
        first = None if adapted else dtype
        of_parameter: dict[int, nn.Parameter] = {}
        for name, weight in self._weights():
            # Tied weights come apart where an adapter of the head is merged, which the embedding has no part in.
            if adapted or ids[name] not in of_parameter:
                own = weight.to(first if first is not None and weight.is_floating_point() else weight.dtype, copy=True)
                of_parameter[ids[name]] = nn.Parameter(own, requires_grad=False)
            parent, _, last = name.rpartition(".")
            setattr(outline.get_submodule(parent), last, of_parameter[ids[name]])
        model: Any = outline.to(next(iter(of_parameter.values())).device)
        if adapted:
            model = model.merge_and_unload()
        return model.to(dtype) if dtype is not None and adapted else model


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
