"""A teacher that runs beside the student."""

from typing import Any, Self

import torch
from torch import Tensor, nn

from akl_lightning.chunked import Logits
from akl_lightning.models import Batch, SplitModel


class LiveTeacher:
    """A frozen model that answers with logits.

    It is no module on purpose: whoever walks over the student's module (optimizers, checkpoints, parameter counts,
    gradient synchronisation, deep copies of SWA and EMA) never meets it. It stays in eval mode, without gradients, and
    in the precision in which it was loaded.

    Args:
        model: the language model; its parameters are frozen in place.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = SplitModel(model).eval().requires_grad_(False)

    @torch.no_grad()
    def __call__(self, batch: Batch, positions: Tensor) -> Logits:
        """Logits ``[tokens, vocab]``, or what gives them, at ``positions``, boolean ``[batch, length]``."""
        return self.model.eval()(batch, positions)

    def to(self, device: torch.device) -> Self:
        """Move to the device, unless it is the meta device, where weights would be lost."""
        if device.type != "meta":
            self.model.to(device)
        return self

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        return self
