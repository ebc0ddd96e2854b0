"""A teacher that runs beside the student."""

from collections.abc import Mapping
from contextlib import suppress
from typing import Any, Self

import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, register_fsdp_forward_method
from transformers import PreTrainedTokenizerBase

from akl_lightning.batch import Batch
from akl_lightning.errors import UsageError
from akl_lightning.models.load import Precision, load_causal_lm, outline_causal_lm
from akl_lightning.models.split import SplitModel
from akl_lightning.parallel import load_sharded, shard
from akl_lightning.projection import Projection
from akl_lightning.teachers.base import Teacher


class LiveTeacher(Teacher):
    """A frozen model that answers with logits.

    It stays in eval mode, without gradients, and in the precision in which it was loaded.

    Args:
        source: the language model, whose parameters are frozen in place, or what
            :func:`akl_lightning.models.load.load_causal_lm` makes one of. The weights behind a name or folder are read
            when they are first needed, by :meth:`load` at the latest.
        trust_remote_code: run Python code that comes with the model.
        role: what an error calls it.
        precision: of the weights; those of a module stay as they are.
        attn_implementation: as for :func:`akl_lightning.models.load.load_causal_lm`.
        packing: as for :class:`akl_lightning.models.split.SplitModel`.
    """

    def __init__(
        self,
        source: nn.Module | Mapping[str, Any] | str,
        trust_remote_code: bool = False,
        role: str = "teacher",
        precision: Precision = "auto",
        attn_implementation: str | None = None,
        packing: bool = False,
    ) -> None:
        self._packing = packing
        self._unread: str | None = None
        self._how = (trust_remote_code, role, precision, attn_implementation)
        self._device: torch.device | None = None
        if isinstance(source, str) and not source.endswith(".gguf"):
            with suppress(UsageError):  # an adapter, which has no config of its own, or nothing at all
                self._model, self._unread = self._frozen(outline_causal_lm(source, *self._how)), source
        if self._unread is None:
            self._model = self._frozen(load_causal_lm(source, *self._how))
        self.longest = self.max_positions

    @property
    def model(self) -> SplitModel:
        """The language model; on the meta device, where it takes no memory, until :meth:`read` or :meth:`load`."""
        return self._model

    def read(self) -> SplitModel:
        """The language model with its weights, which are read if that is not done yet."""
        if self._unread is not None:
            self._model, self._unread = self._frozen(load_causal_lm(self._unread, *self._how)), None
            if self._device is not None:
                self._model.to(self._device)
        return self._model

    def load(self, mesh: DeviceMesh | None) -> None:
        if mesh is None:
            self.read()
            return
        if self._unread is not None:
            sharded = load_sharded(self._unread, mesh, self._frozen, *self._how)
            if sharded is not None:
                self._model, self._unread = sharded, None
            else:
                rank_zero_warn(
                    f"the weights in {self._unread!r} are no plain safetensors under today's names: every rank reads "
                    "all of them before they are sharded. Load the model and save it with save_pretrained to avoid it."
                )
        model = self.read()
        if not isinstance(model, FSDPModule):
            shard(model, mesh, model.model)
        register_fsdp_forward_method(model, "generate")

    @property
    def description(self) -> str:
        return self._model.description

    @property
    def num_parameters(self) -> int:
        return sum(parameter.numel() for parameter in self._model.parameters())

    @property
    def vocab_size(self) -> int | None:
        return self._model.vocab_size

    @property
    def max_positions(self) -> int | None:
        """Longest sequence that the model has positions for, or None where it does not say."""
        return self._model.max_positions

    def check_fits(self, name: str, tokenizer: PreTrainedTokenizerBase | None, max_length: int | None) -> None:
        self._model.check_fits(name, tokenizer, max_length)

    def prepare(self, batch: Batch, positions: Tensor) -> dict[str, Any]:
        """Nothing more.

        Raises:
            UsageError: the model cannot be given an entry of the batch.
        """
        self._model.check_inputs(batch, self._how[1])
        return {}

    @torch.no_grad()
    def __call__(self, batch: Batch, positions: Tensor) -> Tensor | Projection:
        return self.read().eval()(batch, positions)

    def release(self) -> None:
        if isinstance(self._model, FSDPModule):
            self._model.reshard()

    def to(self, device: torch.device) -> Self:
        if device.type != "meta" and not isinstance(self._model, FSDPModule):
            self._device = device
            if self._unread is None:
                self._model.to(device)
        return self

    def _frozen(self, model: nn.Module) -> SplitModel:
        return SplitModel(model, self._packing).eval().requires_grad_(False)
