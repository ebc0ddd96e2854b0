"""The model under the student's own adapter as the teacher: one copy of the weights."""

from typing import Self

import torch
from lightning.pytorch import Trainer
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from transformers import PreTrainedTokenizerBase

from akl_lightning.batch import Batch
from akl_lightning.compat import without_adapters
from akl_lightning.criterion import DistillationCriterion
from akl_lightning.errors import UsageError
from akl_lightning.models.layers import evaluating
from akl_lightning.models.lora import adapter_parameters
from akl_lightning.models.split import SplitModel
from akl_lightning.projection import Logits, Projection
from akl_lightning.teachers.base import Teacher

BASE = "base"
"""What is given in a teacher's place to mean this one."""


class BaseModelTeacher(Teacher):
    """The student without its adapter, in eval mode.

    It lies where the student lies, and is sharded as the student is.

    Args:
        student: one that PEFT has wrapped.

    Raises:
        UsageError: one that has no adapter.
    """

    def __init__(self, student: SplitModel) -> None:
        if not hasattr(student.model, "peft_config") or student.causal_lm is None:
            raise UsageError(
                f"model.teacher {BASE} is the model under the student's adapter, and the student has none: give "
                "model.lora, an adapter's folder as the student, or another teacher."
            )
        self._student = student
        self._model = SplitModel(student.causal_lm, student.packing)

    @property
    def description(self) -> str:
        return f"{self._model.description} (the student without its adapter)"

    @property
    def num_parameters(self) -> int:
        return sum(parameter.numel() for parameter in self._own().values())

    def _own(self) -> dict[str, nn.Parameter]:
        """The parameters of the model without those of the adapter, by name."""
        adapter = {id(parameter) for parameter in adapter_parameters(self._student.model)}
        return {name: own for name, own in self._model.named_parameters() if id(own) not in adapter}

    @property
    def vocab_size(self) -> int | None:
        return self._model.vocab_size

    def check_fits(self, name: str, tokenizer: PreTrainedTokenizerBase | None, max_length: int | None) -> None:
        self._model.check_fits(name, tokenizer, max_length)

    def check_run(self, stage: str, trainer: Trainer, criterion: DistillationCriterion) -> None:
        for name, parameter in self._own().items() if stage == "fit" else ():
            if parameter.requires_grad:
                raise UsageError(
                    f"model.teacher {BASE} would change as the student learns, which trains {name} as well: freeze it, "
                    "or give another teacher."
                )

    @torch.no_grad()
    def __call__(self, batch: Batch, positions: Tensor) -> Logits:
        with without_adapters(self._student.model), evaluating(self._student.model):
            logits = self._model(batch, positions)
        if isinstance(logits, Projection):  # which is computed when adapters are at work again
            return Projection(logits.hidden, _without_adapter(logits.head), logits.soft_cap)
        return logits

    def load(self, mesh: DeviceMesh | None) -> None:
        """Do nothing: the student is there."""

    def to(self, device: torch.device) -> Self:
        return self


def _without_adapter(head: nn.Module) -> nn.Module:
    """The output layer itself, of one that has an adapter or is trained as a copy."""
    original = getattr(head, "original_module", None)
    if isinstance(original, nn.Module):
        return original
    return head.get_base_layer() if hasattr(head, "get_base_layer") else head  # type: ignore[operator]
