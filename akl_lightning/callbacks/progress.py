"""A progress bar that shows what distillation is about."""

import time
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import RichProgressBar
from lightning.pytorch.callbacks.progress.rich_progress import CustomBarColumn, ProcessingSpeedColumn
from torch import Tensor

from akl_lightning.callbacks.checks import require_distillation
from akl_lightning.compat import counts_epochs_without_end

_LOOK_EVERY_SECONDS = 0.5


@counts_epochs_without_end
class DistillationProgressBar(RichProgressBar):
    """Lightning's Rich progress bar with loss, mean head weight and tokens per second of all devices.

    Tokens are those of prompts and responses, without padding. The numbers are read twice a second at most, as reading
    waits for the device, and at the end of an epoch; they are over the batches since.

    Args:
        refresh_rate: times a second that the bar is drawn; 0 for no bar.
        leave: keep the bar of each epoch.
    """

    def __init__(self, refresh_rate: int = 10, leave: bool = False) -> None:
        super().__init__(refresh_rate, leave)
        self._shown: dict[str, Any] = {}
        self._sums: list[Tensor] = []
        self._since = self._until = 0.0

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Check that the module gives the numbers."""
        if stage == "fit":
            require_distillation(self, pl_module, "use RichProgressBar for others")
        super().setup(trainer, pl_module, stage)
        self._shown = {}

    def configure_columns(self, trainer: Trainer) -> list[Any]:
        """Lightning's with a shorter bar, and without batches per second, which tokens per second say better."""
        columns = super().configure_columns(trainer)
        for column in columns:
            if isinstance(column, CustomBarColumn):
                column.bar_width = 12
        return [column for column in columns if not isinstance(column, ProcessingSpeedColumn)]

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Count from here."""
        self._begin()
        super().on_train_epoch_start(trainer, pl_module)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Do not count the time that validation took."""
        super().on_validation_end(trainer, pl_module)
        self._begin()

    def _begin(self) -> None:
        self._sums.clear()
        self._since = time.monotonic()

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Count the batch."""
        if self.is_enabled:
            weights = outputs["statistics"].get("head_weight", torch.empty(0, device=outputs["loss"].device))
            known = ~weights.isnan()  # NaN where a teacher is not aligned
            sums = batch["attention_mask"].sum().to(weights), weights.nansum(), known.sum().to(weights)
            self._sums.append(torch.stack(sums))
            self._until = time.monotonic()
        super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)

    def get_metrics(self, trainer: Trainer, pl_module: LightningModule) -> dict[str, Any]:
        """What stands beside the bar: ``loss``, ``head weight``, ``tokens/s``, and what else asked to be there."""
        seconds = self._until - self._since
        if not self._sums or (self._shown and seconds < _LOOK_EVERY_SECONDS and not trainer.is_last_batch):
            return self._shown
        tokens, weight, weighted = torch.stack(self._sums).sum(0).tolist()
        shown = {name: value for name, value in super().get_metrics(trainer, pl_module).items() if name != "v_num"}
        self._shown = {"loss": shown.pop("train/loss_step", "-")}
        if weighted:
            self._shown["head weight"] = weight / weighted
        # Samples are dealt out evenly, so that the other devices are as fast.
        self._shown["tokens/s"] = f"{tokens * trainer.world_size / seconds:,.0f}"
        self._shown |= shown
        self._begin()
        return self._shown
