"""A teacher that runs beside the student."""

from collections.abc import Callable, Mapping
from typing import Any, Self, TypeVar

import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule

from akl_lightning.chunked import Logits
from akl_lightning.models import Batch, SplitModel, load_causal_lm, outline_causal_lm
from akl_lightning.parallel import load_sharded, shard

Result = TypeVar("Result")


class LiveTeacher:
    """A frozen model that answers with logits.

    It is no module on purpose: whoever walks over the student's module (optimizers, checkpoints, parameter counts,
    gradient synchronisation, deep copies of SWA and EMA) never meets it. It stays in eval mode, without gradients, and
    in the precision in which it was loaded.

    Args:
        source: the language model, whose parameters are frozen in place, or what
            :func:`akl_lightning.models.load_causal_lm` makes one of. The weights behind a name or folder are read when
            they are first needed, by :meth:`load` at the latest.
        trust_remote_code: run Python code that comes with the model.
    """

    def __init__(self, source: nn.Module | Mapping[str, Any] | str, trust_remote_code: bool = False) -> None:
        self._unread = source if isinstance(source, str) and not source.endswith(".gguf") else None
        self._trust_remote_code = trust_remote_code
        self._device: torch.device | None = None
        if self._unread is None:
            self._model = _frozen(load_causal_lm(source, trust_remote_code, "teacher"))
        else:
            self._model = _frozen(outline_causal_lm(self._unread, trust_remote_code, "teacher"))

    @property
    def model(self) -> SplitModel:
        """The language model."""
        if self._unread is not None:
            self._model = _frozen(load_causal_lm(self._unread, self._trust_remote_code, "teacher"))
            self._unread = None
            if self._device is not None:
                self._model.to(self._device)
        return self._model

    def load(self, mesh: DeviceMesh | None) -> None:
        """Read the weights.

        Args:
            mesh: the devices to shard them over; then each rank reads no more than its shard.
        """
        if mesh is None:
            self.model  # noqa: B018 (reading it is what loads it)
            return
        if self._unread is not None:
            sharded = load_sharded(self._unread, mesh, _frozen, self._trust_remote_code)
            if sharded is not None:
                self._model, self._unread = sharded, None
            else:
                rank_zero_warn(
                    f"the weights in {self._unread!r} are no safetensors under today's names: every rank reads all of "
                    "them before they are sharded. Load the model and save it with save_pretrained to avoid that."
                )
        if not isinstance(self.model, FSDPModule):
            shard(self.model, mesh, self.model.model, release=True)

    @property
    def vocab_size(self) -> int | None:
        """See :attr:`akl_lightning.models.SplitModel.vocab_size`."""
        return self._model.vocab_size

    def check_fits(self, *args: Any) -> None:
        """See :meth:`akl_lightning.models.SplitModel.check_fits`."""
        self._model.check_fits(*args)

    @torch.no_grad()
    def __call__(self, batch: Batch, positions: torch.Tensor, consume: Callable[[Logits], Result]) -> Result:
        """Ask for logits and hand them on.

        Args:
            batch: ``input_ids`` and ``attention_mask``, each ``[batch, length]``.
            positions: boolean ``[batch, length]``; only these are asked for.
            consume: called with logits ``[tokens, vocab]``, or what gives them, while the head's weight is at hand;
                what it returns is returned.
        """
        return self.model.eval()(batch, positions, consume)

    def to(self, device: torch.device) -> Self:
        """Move to the device, unless it is the meta device, where weights would be lost."""
        if device.type != "meta" and not isinstance(self._model, FSDPModule):
            self._device = device
            if self._unread is None:
                self._model.to(device)
        return self

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        return self


def _frozen(model: nn.Module) -> SplitModel:
    return SplitModel(model).eval().requires_grad_(False)
