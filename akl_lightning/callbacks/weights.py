"""The adaptive head weight while training."""

from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor

from akl_lightning.callbacks.checks import require_logger, require_teacher
from akl_lightning.callbacks.loggers import log_histogram
from akl_lightning.errors import check_count

_BINS = 20


class AdaptiveWeightMonitor(Callback):
    """Log the adaptive head weight while training: its mean and its histogram, to every logger.

    The weight says where the student is still off: near 1 in the teacher's head (AKL acts as FKL), near 0 in the tail
    (AKL acts as RKL). Logged over the response tokens of the optimizer step, on all ranks: the mean as
    ``train/head_weight_step``, the histogram as ``train/head_weight_per_token`` (under CSV and MLflow, which have
    none, as the share of tokens in each of 20 bins).

    Args:
        every_n_steps: optimizer steps between two records.

    Raises:
        UsageError: no logger, or no teacher.
    """

    def __init__(self, every_n_steps: int = 50) -> None:
        check_count("every_n_steps", every_n_steps)
        self.every_n_steps = every_n_steps
        self._weights: list[Tensor] = []
        self._last_step = 0

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Check that there is something to log and somewhere to log it."""
        if stage == "fit":
            require_teacher(self, pl_module)
            require_logger(self, trainer)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Count from where a resumed run goes on."""
        self._last_step = trainer.global_step
        self._weights.clear()

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Collect the weights of a step's micro-batches; log them when it is time."""
        self._weights.append(outputs["statistics"]["head_weight"])
        if trainer.global_step == self._last_step:  # the optimizer has not stepped yet
            return
        step = self._last_step = trainer.global_step
        weights = torch.cat(self._weights)
        self._weights.clear()
        if step % self.every_n_steps:
            return
        known = (~weights.isnan()).sum()[None].to(weights.dtype)  # NaN where a teacher is not aligned
        totals = torch.cat([weights.nansum()[None], known, weights.histc(_BINS, 0, 1)])
        total, tokens, *counts = trainer.strategy.reduce(totals, reduce_op="sum").cpu()
        if not tokens:
            return
        mean = (total / tokens).item()
        for logger in trainer.loggers:
            logger.log_metrics({"train/head_weight_step": mean}, step=step)
        log_histogram(trainer, "train/head_weight_per_token", torch.stack(counts).numpy(), mean, step)
