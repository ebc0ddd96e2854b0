"""A checkpoint from which a run goes on exactly where it was."""

import os
import shlex
import signal
import sys
import threading
from pathlib import Path
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.utilities import rank_zero_info

from akl_lightning.callbacks.checks import require_distillation
from akl_lightning.checkpoint import check_writable
from akl_lightning.compat import log_step_now
from akl_lightning.errors import UsageError, check_count
from akl_lightning.module import DistillationModule
from akl_lightning.rollouts.sampler import EngineError


class LastCheckpoint(ModelCheckpoint):
    """Keep ``last.ckpt``, from which a run goes on exactly where it was, whenever and however it ends.

    It is written after every validation (where an epoch has none, after the first optimizer step of the next one),
    every so many optimizer steps, at the end, and when the process is asked to end (SIGTERM, Ctrl-C), always between
    two whole optimizer steps and after the loggers have been flushed. Then the run ends with ``SystemExit``: a command
    with exit code 143 or 130, while a notebook's kernel lives on. A second Ctrl-C ends at once. Use it beside a
    ``ModelCheckpoint`` that keeps the best, and list it last, so that it knows what the other has kept.

    Args:
        dirpath: the folder; as for ``ModelCheckpoint`` where it is not given.
        every_n_steps: optimizer steps between two writes within an epoch, or None.
    """

    def __init__(self, dirpath: str | Path | None = None, every_n_steps: int | None = None) -> None:
        check_count("every_n_steps", every_n_steps)
        super().__init__(dirpath, save_top_k=0, save_last=True)
        self.every_n_steps = every_n_steps
        self.command: str | None = None
        """The command line of the run, if it has one, which ``--ckpt_path`` is added to where it is said."""
        self._asked_by = signal.SIGTERM
        self._last_step = self._last_written = 0
        self._due = False

    @property
    def path(self) -> Path:
        """The file."""
        assert self.dirpath is not None
        return Path(self.dirpath) / f"{self.CHECKPOINT_NAME_LAST}{self.FILE_EXTENSION}"

    def look(self, root: Path, goes_on: bool) -> None:
        """Look at the file before any work.

        Args:
            root: the Trainer's ``default_root_dir``; where the folder is not given, the loggers' new one is taken.
            goes_on: whether the run goes on from a checkpoint.

        Raises:
            UsageError: it is another run's, or cannot be written.
        """
        if self.dirpath is None or "://" in str(self.dirpath):
            return
        if not goes_on and self.path.exists() and self.last_model_path != str(self.path):
            raise UsageError(
                f"{self.path} is another run's and is never overwritten: go on from it with ckpt_path, or give another "
                "dirpath."
            )
        check_writable(Path(self.dirpath))

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Check that the module says when a step is whole."""
        require_distillation(self, pl_module, "use ModelCheckpoint for others")
        super().setup(trainer, pl_module, stage)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Be told when the process shall end. Lightning's own way stops in the middle of an optimizer step.

        Raises:
            UsageError: the file is another run's.
        """
        # Not before: the Trainer knows its ckpt_path only now.
        self.look(Path(trainer.default_root_dir), goes_on=bool(trainer.ckpt_path))
        self._last_step = self._last_written = trainer.global_step

        def request_stop(number: int, _: Any) -> None:
            pl_module.stop_requested = True  # type: ignore[assignment]
            self._asked_by = signal.Signals(number)
            if number == signal.SIGINT:
                signal.signal(number, signal.default_int_handler)  # a second one ends at once
                if trainer.is_global_zero:  # past sys.stderr, which may be in the middle of a line
                    os.write(2, b"\nfinishing the optimizer step, then writing last.ckpt; Ctrl-C again ends at once\n")

        self._asked_by = signal.SIGTERM
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGTERM, signal.SIGINT):
                signal.signal(number, request_stop)  # which the Trainer takes back at its end

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: DistillationModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Write when it is time and the optimizer has stepped."""
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
            log_step_now(trainer)
            self._write(trainer, pl_module)

    def on_validation_end(self, trainer: Trainer, pl_module: DistillationModule) -> None:
        """Write, or let the end of the optimizer step do it."""
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

    def on_train_end(self, trainer: Trainer, pl_module: DistillationModule) -> None:
        """Write what is not written yet."""
        # Nobody has told the others of a wish that came after the last step.
        wished = trainer.strategy.reduce_boolean_decision(pl_module.stop_requested, all=False)
        pl_module.stop_agreed |= wished
        if pl_module.stop_agreed or self._last_written != trainer.global_step:
            self._write(trainer, pl_module)

    def on_exception(self, trainer: Trainer, pl_module: DistillationModule, exception: BaseException) -> None:
        """Write where sampling has failed between two optimizer steps, on all ranks: nothing of the run is lost."""
        if isinstance(exception, EngineError) and not pl_module.in_step and self._last_written != trainer.global_step:
            self._write(trainer, pl_module)

    def _write(self, trainer: Trainer, pl_module: DistillationModule) -> None:
        if trainer.fast_dev_run:  # type: ignore[attr-defined]
            return
        for logger in trainer.loggers:
            logger.save()
        self.last_model_path = str(self.path)
        trainer.save_checkpoint(self.path, weights_only=False)
        self._due, self._last_written = False, trainer.global_step
        if pl_module.stop_agreed:
            path = shlex.quote(os.path.relpath(self.path) if self.command else str(self.path))
            how = f"with: {self.command} --ckpt_path {path}" if self.command else f"from {path}"
            rank_zero_info(f"stopped as asked after optimizer step {trainer.global_step}; go on {how}")
            # Only one process says so: a launcher that sees another one fail kills the rest.
            sys.exit(128 + self._asked_by if trainer.is_global_zero else 0)
