"""What a checkpoint holds beyond Lightning's own, so that a run goes on exactly where it was."""

import re
from typing import TYPE_CHECKING, Any

from lightning.pytorch.callbacks import LearningRateFinder
from lightning.pytorch.strategies import FSDPStrategy
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from lightning_utilities import apply_to_collection
from torch import Tensor

from akl_lightning.checkpoint import key_by_name, random_states, set_random_states
from akl_lightning.compat import forget_loaded_data
from akl_lightning.data.facts import facts_of_run
from akl_lightning.data.sampler import accumulated
from akl_lightning.errors import UsageError
from akl_lightning.frozen import LEFT_OUT
from akl_lightning.optimization import Continuation, Settings, kept_rate, say_rate, settings_of
from akl_lightning.parallel import gather_objects

if TYPE_CHECKING:
    from akl_lightning.module import DistillationModule


Split = list[Any]
"""How the samples of a step are split: samples of a micro-batch (or None), devices, micro-batches of a step."""


class Resume:
    """Writes the epoch's means so far, each rank's random numbers and how steps are split, and takes them up again.

    Args:
        module: whose run it is.
    """

    def __init__(self, module: "DistillationModule") -> None:
        self.module = module
        self.forget()

    def forget(self) -> None:
        """Begin anew, without what a run that was broken off has left."""
        self._random_states: list[dict[str, Any]] = []
        self._checkpoint: dict[str, Any] | None = None
        self._settings: Settings | None = None

    def prepare(self) -> None:
        """Get ready for what Lightning restores next: the place in the data, optimizer states by parameter names."""
        module, trainer = self.module, self.module.trainer
        forget_loaded_data(trainer)
        callbacks = trainer.callbacks  # type: ignore[attr-defined]
        if module.lr is not None and any(isinstance(callback, LearningRateFinder) for callback in callbacks):
            # The finder sets the optimizer's rate, and a schedule would set it back to what it was made with.
            trainer.strategy.setup_optimizers(trainer)
        if not isinstance(trainer.strategy, FSDPStrategy):  # which has its own way to gather them
            for optimizer in trainer.optimizers:
                key_by_name(optimizer, module)
        self._settings = settings_of(module)
        self._go_on()

    def _go_on(self) -> None:
        """Let what is asked for now win; called when there is both an optimizer and a checkpoint."""
        module, trainer = self.module, self.module.trainer
        if self._settings is None or self._checkpoint is None:
            return
        if (kept := kept_rate(self._settings, self._checkpoint)) is not None:
            rank_zero_info(f"the learning rate stays {kept:g}, the checkpoint's, as no other is given.")
            module.lr = kept
            trainer.strategy.setup_optimizers(trainer)
            self.prepare()
            return
        checkpoint, self._checkpoint = self._checkpoint, None
        Continuation(trainer, self._settings, checkpoint).prepare()

    def save(self, checkpoint: dict[str, Any]) -> None:
        """Add what Lightning leaves out. Called on all ranks."""
        module, trainer = self.module, self.module.trainer
        module.frozen_weights.leave_out(checkpoint)
        if module.teacher is not None and module.teacher.fingerprint is not None:
            checkpoint["teacher"] = module.teacher.fingerprint
        if module.in_step:
            rank_zero_warn(
                f"checkpoint in the middle of an optimizer step: its {len(module.step_mean)} micro-batches so far are "
                "missing from a run that resumes there. Save after whole steps, as LastCheckpoint does."
            )
        checkpoint["settings"] = self._settings
        checkpoint["split"] = self._split(module.current_epoch)
        begun = trainer.fit_loop.epoch_loop.batch_progress.current.ready > 0
        checkpoint["within_epoch"] = begun and not trainer.is_last_batch
        module.rollouts.save(checkpoint)
        checkpoint["random_states"] = gather_objects(trainer, random_states())
        checkpoint["train_metrics"] = {}
        for name, metric in module.train_metrics.items(keep_base=True):
            with metric.sync_context():
                state = apply_to_collection(metric.metric_state, Tensor, Tensor.cpu)
                checkpoint["train_metrics"][name] = state

    def check(self, checkpoint: dict[str, Any]) -> None:
        """Raise :class:`UsageError` where the checkpoint is of another student, or of another teacher's cache."""
        module, weights = self.module, checkpoint.get("state_dict")
        if weights is not None:
            module.frozen_weights.put_back(checkpoint)
            own, theirs = (
                {name: getattr(value, "shape", None) for name, value in of.items()}
                for of in (module.state_dict(), weights)
            )
            left_out = checkpoint.get(LEFT_OUT, {})
            # Where weights are sharded, those that are left out stay so.
            theirs |= {name: own.get(name, "none") for name in left_out if name not in theirs}
            odd = [name for name in {**own, **theirs} if own.get(name) != theirs.get(name)]
            if odd and module.strict_loading:
                raise UsageError(
                    f"the checkpoint is of another student, they differ in {odd[0].removeprefix('student.')}: give "
                    "model.student as it was in that run, or another checkpoint."
                )
        ours = None if module.teacher is None else module.teacher.fingerprint
        if ours is not None and checkpoint.get("teacher", ours) != ours:
            raise UsageError(
                "the checkpoint was trained with the cache of another teacher, its weights differ: give model.teacher "
                "that cache, or start a new run."
            )

    def load(self, checkpoint: dict[str, Any]) -> None:
        """Take up the epoch's means; random numbers wait until :meth:`start`.

        Raises:
            UsageError: it lies within an epoch whose steps were split otherwise.
        """
        module, trainer = self.module, self.module.trainer
        here = self._split(checkpoint["epoch"])
        there = checkpoint.get("split", _split_in_words(checkpoint.get("dealt", "")) or here)
        if checkpoint.get("within_epoch") and there != here:
            raise UsageError(
                f"the checkpoint lies within an epoch whose steps were {_said(there)}, not {_said(here)}: go on with "
                "the same, or from a checkpoint at the end of an epoch."
            )
        # Lightning's finders try some steps before the run, and then go back to where they were.
        module.step_mean.forget()
        module.train_metrics.reset()
        module.rollouts.load(checkpoint)
        shuffled_here = facts_of_run(trainer).group_by_length is not None
        if shuffled_here and checkpoint.get("within_epoch") and "settings" not in checkpoint:
            rank_zero_warn(
                "the checkpoint lies within an epoch whose samples an earlier version has put into another order: the "
                "rest of this epoch has some of them twice and lacks others; the next one has each once again."
            )
        self._random_states = checkpoint.get("random_states", [])
        self._checkpoint = checkpoint
        self._go_on()
        if trainer.is_global_zero:  # sums over ranks, so one of them has it all
            for name, state in checkpoint.get("train_metrics", {}).items():
                if name not in module.train_metrics:
                    continue
                metric = module.train_metrics[name]
                metric.update()
                metric.merge_state({key: value.to(metric.device) for key, value in state.items()})

    def start(self) -> None:
        """Go on with the accumulation and the random numbers of the run that is resumed."""
        trainer = self.module.trainer
        trainer.accumulate_grad_batches = accumulated(trainer, self.module.current_epoch)
        if trainer.global_rank < len(self._random_states):
            set_random_states(self._random_states[trainer.global_rank])
        self._random_states = []
        say_rate(self.module)

    def _split(self, epoch: int) -> Split:
        trainer = self.module.trainer
        return [facts_of_run(trainer).batch_size, trainer.world_size, accumulated(trainer, epoch)]


def _said(split: Split) -> str:
    batch_size, devices, accumulated = split
    samples = "?" if batch_size is None else batch_size
    return f"{samples} samples per device × {devices} device{'s' * (devices != 1)} × {accumulated} accumulated"


def _split_in_words(said: str) -> Split | None:
    """How the checkpoints of earlier versions have it."""
    found = re.fullmatch(r"(\d+) processes x (\d+|\?) samples x (\d+) accumulated", said)
    return found and [None if found[2] == "?" else int(found[2]), int(found[1]), int(found[3])]
