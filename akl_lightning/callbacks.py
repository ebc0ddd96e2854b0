"""What to watch during distillation, and what to keep of it."""

import signal
import sys
import threading
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
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
    (AKL acts as RKL). Logged as ``train/head_weight_step``, over the response tokens of the optimizer step.

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
        self._last_step = 0

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Check that there is something to log and somewhere to log it."""
        if stage == "fit":
            _require_teacher(self, pl_module)
            if not trainer.loggers:
                raise UsageError("AdaptiveWeightMonitor needs a logger: give the Trainer one or remove the callback.")

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

    # At once, so that a checkpoint written at the end of a validation has it.
    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Keep what the validation has logged."""
        if not trainer.sanity_checking:
            self._record(trainer, "val", trainer.current_epoch + 1)

    # Lightning logs an epoch's training means after the callbacks' own on_train_epoch_end.
    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Draw what the epoch before has logged."""
        if trainer.current_epoch:
            self._record(trainer, "train", trainer.current_epoch)
            self._draw(trainer)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Draw what the last epoch has logged."""
        self._record(trainer, "train", trainer.current_epoch)
        self._draw(trainer)

    def _record(self, trainer: Trainer, stage: str, epochs: int) -> None:
        for part in ("head_error", "tail_error"):
            value = trainer.callback_metrics.get(f"{stage}/{part}")
            points = self.history.setdefault(f"{stage}/{part}", [])
            if value is not None:
                if points and points[-1][0] == epochs:  # several validations within an epoch
                    points.pop()
                points.append((epochs, value.item()))

    def _draw(self, trainer: Trainer) -> None:
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
        return {"history": self.history, "name": self.path.name if self.path else None}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on with the curves of the run that is resumed."""
        self.history = {name: [tuple(point) for point in points] for name, points in state_dict["history"].items()}
        if self.path and state_dict["name"]:
            self.path = self.path.with_name(state_dict["name"])


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
        assert isinstance(pl_module, DistillationModule)
        # On every rank: where the student is sharded, each has a part of it.
        weights = trainer.strategy.lightning_module_state_dict()
        if trainer.is_global_zero:
            prefix = "student.model."
            own = {name.removeprefix(prefix): weights[name] for name in weights if name.startswith(prefix)}
            path = free_path(Path(self.dirpath or Path(trainer.default_root_dir) / "student"))
            with atomic_folder(path) as folder:
                pl_module.student.model.save_pretrained(folder, state_dict=own)
                tokenizer = getattr(getattr(trainer, "datamodule", None), "tokenizer", None)
                if tokenizer is not None:
                    tokenizer.save_pretrained(folder)
            self.exported = path
            rank_zero_info(f"student exported to {path}")


class LastCheckpoint(ModelCheckpoint):
    """Keep ``last.ckpt``, from which a run goes on exactly where it was, whenever and however it ends.

    It is written after every validation (where an epoch has none, after the first optimizer step of the next one),
    every so many optimizer steps, at the end, and when the process is asked to end (SIGTERM), always between two whole
    optimizer steps and after the loggers have been flushed. Use it beside a ``ModelCheckpoint`` that keeps the best,
    and list it last, so that it knows what the other has kept.

    Args:
        dirpath: the folder; as for ``ModelCheckpoint`` where it is not given.
        every_n_steps: optimizer steps between two writes within an epoch, or None.
    """

    def __init__(self, dirpath: str | Path | None = None, every_n_steps: int | None = None) -> None:
        if every_n_steps is not None and every_n_steps < 1:
            raise UsageError(f"every_n_steps must be 1 or more, got {every_n_steps}.")
        super().__init__(dirpath, save_top_k=0, save_last=True)
        self.every_n_steps = every_n_steps
        self._last_step = self._last_written = 0
        self._due = False

    @property
    def path(self) -> Path:
        """The file."""
        assert self.dirpath is not None
        return Path(self.dirpath) / f"{self.CHECKPOINT_NAME_LAST}{self.FILE_EXTENSION}"

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Check that the module says when a step is whole."""
        if not isinstance(pl_module, DistillationModule):
            raise UsageError("LastCheckpoint needs a DistillationModule: use ModelCheckpoint for others.")
        super().setup(trainer, pl_module, stage)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Be told when the process shall end. Lightning's own way stops in the middle of an optimizer step.

        Raises:
            UsageError: the file is another run's.
        """
        # Not before: the Trainer knows its ckpt_path only now.
        if not trainer.ckpt_path and self.path.exists() and self.last_model_path != str(self.path):
            raise UsageError(
                f"{self.path} is another run's and is never overwritten: go on from it with ckpt_path, or give another "
                "dirpath."
            )
        self._last_step = self._last_written = trainer.global_step

        def request_stop(*_: Any) -> None:
            pl_module.stop_requested = True  # type: ignore[assignment]

        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, request_stop)  # which the Trainer takes back at its end

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Write when it is time and the optimizer has stepped."""
        assert isinstance(pl_module, DistillationModule)
        step = trainer.global_step
        if step != self._last_step:
            self._last_step = step
            self._due |= pl_module.stop_agreed or (self.every_n_steps is not None and step % self.every_n_steps == 0)
        # Lightning does not make up for what a resumed run would have done right after this batch: a validation, the
        # end of an epoch. The next write comes with that.
        batches = (batch_idx + 1, trainer.fit_loop.total_batch_idx + 1)
        validates = trainer.val_check_batch and any(count % trainer.val_check_batch == 0 for count in batches)
        ends = trainer.is_last_batch or step == trainer.max_steps
        if self._due and not (pl_module.in_step or validates or ends):
            # Lightning logs this step only after this hook, and a run that goes on from here would not: it is logged
            # now as well, with the same values.
            trainer._logger_connector.update_train_step_metrics()
            self._write(trainer, pl_module)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write, or let the end of the optimizer step do it."""
        assert isinstance(pl_module, DistillationModule)
        if trainer.state.fn != "fit" or trainer.sanity_checking:
            return
        self._due = True
        # At max_steps a resumed run would be over at once, without the means of its epoch.
        if not pl_module.in_step and trainer.global_step != trainer.max_steps:
            self._write(trainer, pl_module)

    # Not at the end of an epoch: Lightning logs its means only afterwards, and a resumed run would not.
    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Let the next optimizer step write where no validation has."""
        self._due |= self._last_written != trainer.global_step

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write what is not written yet."""
        if self._last_written != trainer.global_step:
            self._write(trainer, pl_module)

    def _write(self, trainer: Trainer, pl_module: LightningModule) -> None:
        assert isinstance(pl_module, DistillationModule)
        for logger in trainer.loggers:
            logger.save()
        self.last_model_path = str(self.path)
        trainer.save_checkpoint(self.path)
        self._due, self._last_written = False, trainer.global_step
        if pl_module.stop_agreed:
            rank_zero_info(f"stopped as asked after optimizer step {trainer.global_step}; go on from {self.path}")
            # Only one process says so: a launcher that sees another one fail kills the rest.
            sys.exit(128 + signal.SIGTERM if trainer.is_global_zero else 0)
