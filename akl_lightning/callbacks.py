"""What to watch during distillation, and what to keep of it."""

from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.utilities import rank_zero_info
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from torch import Tensor
from transformers import PreTrainedModel

from akl_lightning.checkpoint import atomic_folder, free_path
from akl_lightning.errors import UsageError
from akl_lightning.module import DistillationModule


def _require_teacher(callback: Callback, module: LightningModule) -> None:
    if not isinstance(module, DistillationModule) or module.teacher is None:
        raise UsageError(f"{type(callback).__name__} needs a DistillationModule with a teacher: remove the callback.")


class AdaptiveWeightMonitor(Callback):
    """Log the adaptive head weight while training: its mean to every logger, its histogram to TensorBoard.

    The weight says where the student is still off: near 1 in the teacher's head (AKL acts as FKL), near 0 in the tail
    (AKL acts as RKL). Logged as ``train/head_weight_step``, over the response tokens since it was logged last.

    Args:
        every_n_steps: optimizer steps between two records.

    Raises:
        UsageError: no logger, or no teacher.
    """

    def __init__(self, every_n_steps: int = 50) -> None:
        if every_n_steps < 1:
            raise UsageError(f"every_n_steps must be 1 or more, got {every_n_steps}.")
        self.every_n_steps = every_n_steps
        self._weights: list[Tensor] = []
        self._logged_step = 0

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Check that there is something to log and somewhere to log it."""
        if stage == "fit":
            _require_teacher(self, pl_module)
            if not trainer.loggers:
                raise UsageError("AdaptiveWeightMonitor needs a logger: give the Trainer one or remove the callback.")

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Collect the batch's weights; log them when it is time."""
        self._weights.append(outputs["statistics"]["head_weight"])
        step = trainer.global_step
        if step == self._logged_step or step % self.every_n_steps:
            return
        self._logged_step = step
        weights = torch.cat(self._weights)
        self._weights.clear()
        totals = torch.stack([weights.sum(), weights.new_tensor(weights.numel())])
        total, tokens = trainer.strategy.reduce(totals, reduce_op="sum")
        if not tokens:
            return
        for logger in trainer.loggers:
            logger.log_metrics({"train/head_weight_step": (total / tokens).item()}, step=step)
            if isinstance(logger, TensorBoardLogger) and trainer.is_global_zero and weights.numel():
                logger.experiment.add_histogram("train/head_weight_per_token", weights.float().cpu(), step)


class HeadTailPlot(Callback):
    """Draw head error and tail error per epoch, for training and validation, as ``head_tail_error.png``.

    The picture is drawn anew after every epoch, and goes to TensorBoard too.

    Args:
        dirpath: folder of the picture; the Trainer's ``default_root_dir`` where it is not given.
    """

    def __init__(self, dirpath: str | None = None) -> None:
        self.dirpath = dirpath
        self.history: dict[str, list[tuple[int, float]]] = {}
        self.path: Path | None = None

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Check that there is a teacher to differ from, and choose a file."""
        if stage == "fit":
            _require_teacher(self, pl_module)
            folder = Path(self.dirpath or trainer.default_root_dir)
            self.path = self.path or free_path(folder / "head_tail_error.png")

    # Lightning logs an epoch's training means after the callbacks' own on_train_epoch_end.
    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Draw what the epoch before has logged."""
        if trainer.current_epoch:
            self._record(trainer, trainer.current_epoch)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Draw what the last epoch has logged."""
        self._record(trainer, trainer.current_epoch)

    def _record(self, trainer: Trainer, epochs: int) -> None:
        for stage in ("train", "val"):
            for part in ("head_error", "tail_error"):
                value = trainer.callback_metrics.get(f"{stage}/{part}")
                points = self.history.setdefault(f"{stage}/{part}", [])
                if value is not None and (not points or points[-1][0] < epochs):
                    points.append((epochs, value.item()))
        if not trainer.is_global_zero or self.path is None:
            return
        figure = draw_head_tail(self.history)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(self.path, dpi=150)
        for logger in trainer.loggers:
            if isinstance(logger, TensorBoardLogger):
                logger.experiment.add_figure("head_tail_error", figure, trainer.global_step)

    def state_dict(self) -> dict[str, Any]:
        """The curves so far and their file, so that a resumed run goes on with them."""
        return {"history": self.history, "path": str(self.path)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on with the curves of the run that is resumed."""
        self.history = {name: [tuple(point) for point in points] for name, points in state_dict["history"].items()}
        self.path = Path(state_dict["path"])


def draw_head_tail(history: dict[str, list[tuple[int, float]]]) -> Figure:
    """Head and tail error against epochs.

    Args:
        history: under ``{train,val}/{head_error,tail_error}``, pairs of epochs done and error.
    """
    figure = Figure(figsize=(6.4, 4), layout="constrained", facecolor="white")
    axes = figure.add_subplot()
    colours = {"head_error": "#0072b2", "tail_error": "#d55e00"}
    styles = {"train": "--", "val": "-"}
    for name, points in sorted(history.items()):
        stage, part = name.split("/")
        if points:
            label = f"{part.replace('_', ' ')}, {'validation' if stage == 'val' else 'training'}"
            axes.plot(*zip(*points, strict=True), styles[stage], color=colours[part], marker="o", ms=4, label=label)
    axes.set(xlabel="epoch", ylabel="mean |p - q| per response token", title="Where the student still differs")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_ylim(bottom=0)
    axes.grid(alpha=0.3)
    if axes.lines:
        axes.legend()
    return figure


class StudentExport(Callback):
    """Write the student as a folder that ``from_pretrained`` loads, with the data's tokenizer, when training ends.

    Args:
        dirpath: the folder; ``student`` in the Trainer's ``default_root_dir`` where it is not given. A folder that is
            there already is left alone: the export goes to ``student-v1`` then, and so on.

    Raises:
        UsageError: the student is no ``transformers`` model.
    """

    def __init__(self, dirpath: str | None = None) -> None:
        self.dirpath = dirpath
        self.exported: Path | None = None
        """Where the student lies, once it is written."""

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Check that the student can be exported."""
        student = getattr(getattr(pl_module, "student", None), "model", None)
        if stage == "fit" and not isinstance(student, PreTrainedModel):
            raise UsageError(
                f"StudentExport cannot write a {type(student).__name__}, only transformers models: remove the callback."
            )

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write the folder."""
        if trainer.is_global_zero:
            assert isinstance(pl_module, DistillationModule)
            path = free_path(Path(self.dirpath or Path(trainer.default_root_dir) / "student"))
            with atomic_folder(path) as folder:
                pl_module.student.model.save_pretrained(folder)
                tokenizer = getattr(getattr(trainer, "datamodule", None), "tokenizer", None)
                if tokenizer is not None:
                    tokenizer.save_pretrained(folder)
            self.exported = path
            rank_zero_info(f"student exported to {path}")
