"""What is distilled into what, before a run, and what came of it, after one."""

import math
import os
import time
from collections.abc import Mapping
from datetime import timedelta
from typing import TypeVar

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint, ModelSummary
from rich import get_console
from rich.box import SIMPLE
from rich.console import Group
from rich.table import Column, Table
from rich.text import Text

from akl_lightning.callbacks.checks import require_distillation
from akl_lightning.criterion import STATISTICS
from akl_lightning.module import DistillationModule

Figure = TypeVar("Figure")


class DistillationSummary(ModelSummary):
    """Print teacher, student and compression ratio before training, and a table of results after it.

    In place of Lightning's model summary, which does not know the teacher.

    Raises:
        UsageError: the module is no DistillationModule.
    """

    def __init__(self) -> None:
        super().__init__()
        self._started = time.monotonic()
        self._results: Group | None = None

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Check that there is a student."""
        if stage == "fit":
            require_distillation(self, pl_module, "use ModelSummary for others")

    def on_fit_start(self, trainer: Trainer, pl_module: DistillationModule) -> None:
        """Print the models."""
        if trainer.is_global_zero:
            get_console().print(models(pl_module))

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start the clock."""
        self._started = time.monotonic()

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Stop the clock."""
        self._results = results(trainer, time.monotonic() - self._started)

    # When the progress bar is gone, and the last checkpoint written.
    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Print the results."""
        if self._results is not None and trainer.is_global_zero:
            get_console().print(self._results, *checkpoints(trainer), sep="\n", soft_wrap=True, markup=False)
        self._results = None


def compression_ratio(module: DistillationModule) -> float | None:
    """How many times the student's parameters the teacher has, or None where that is not known."""
    teacher = None if module.teacher is None else module.teacher.num_parameters
    student = sum(parameter.numel() for parameter in module.student.parameters())
    return teacher / student if teacher and student else None


def models(module: DistillationModule) -> Group:
    """Teacher and student, their parameters, and how many of them are trained."""
    columns = Column(""), Column("model", overflow="fold"), _numbers("parameters"), _numbers("trainable")
    table = Table(*columns, box=SIMPLE, pad_edge=False)
    if module.teacher is not None:
        count = module.teacher.num_parameters
        table.add_row(
            "teacher", module.teacher.description, "not loaded" if count is None else f"{count:,}", "0 (frozen)"
        )
    parameters = list(module.student.parameters())
    trainable = sum(parameter.numel() for parameter in parameters if parameter.requires_grad)
    total = sum(parameter.numel() for parameter in parameters)
    table.add_row("student", module.student.description, f"{total:,}", f"{trainable:,}")
    ratio = compression_ratio(module)
    return Group(
        table, "" if ratio is None else f"compression ratio {ratio:.2f}: the teacher's parameters by the student's"
    )


def results(trainer: Trainer, seconds: float) -> Group:
    """The means of the last epoch, in training and in validation."""
    means: dict[str, dict[str, float]] = {}
    for name, value in trainer.callback_metrics.items():
        stage, _, figure = name.partition("/")
        if stage in ("train", "val") and figure and not figure.endswith("_step"):
            means.setdefault(figure, {})[stage] = value.item()
    columns = Column("per response token"), _numbers("training"), _numbers("validation")
    table = Table(*columns, box=SIMPLE, pad_edge=False)
    for figure, of in in_order(means).items():
        cells = [f"{of[stage]:.4f}" if not math.isnan(of.get(stage, math.nan)) else "-" for stage in ("train", "val")]
        table.add_row(figure.replace("_", " "), *cells)
    took = timedelta(seconds=round(seconds))
    title = f"Trained {trainer.current_epoch} epochs, {trainer.global_step:,} optimizer steps, in {took}"
    return Group(Text(title, style="bold"), table)  # not in markup, which is turned off for the paths below


def _numbers(heading: str) -> Column:
    return Column(heading, justify="right")


def in_order(figures: Mapping[str, Figure]) -> dict[str, Figure]:
    """Figures by name, those of the pack first, in the order in which they explain each other."""
    places = {name.replace("_gap", "_error"): place for place, name in enumerate(STATISTICS)}
    return dict(sorted(figures.items(), key=lambda item: places.get(item[0], len(places))))


def checkpoints(trainer: Trainer) -> list[str]:
    """Where the best and the last checkpoint lie, in words."""
    found = []
    for callback in trainer.checkpoint_callbacks:
        if not isinstance(callback, ModelCheckpoint):
            continue
        best, last = (
            os.path.relpath(path) if os.path.isabs(path) else path  # s3://...
            for path in (callback.best_model_path, callback.last_model_path)
        )
        if callback.monitor and callback.best_model_score is not None:
            found.append(f"best {callback.monitor} {callback.best_model_score:.4f}: {best}")
        elif best and not last:  # ModelCheckpoint's own default keeps the last one as the best
            last = best
        if last:
            found.append(f"last checkpoint: {last}")
    return found
