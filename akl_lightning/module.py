"""The LightningModule that users run or subclass."""

import math
import warnings
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal, NamedTuple, Self

import torch
from jsonargparse import lazy_instance
from lightning.pytorch import Callback, LightningModule
from lightning.pytorch.callbacks import LearningRateFinder, StochasticWeightAveraging, WeightAveraging
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable, ReduceLROnPlateau
from lightning.pytorch.core.optimizer import LightningOptimizer
from lightning.pytorch.plugins.io import TorchCheckpointIO
from lightning.pytorch.strategies import FSDPStrategy, ModelParallelStrategy
from lightning.pytorch.utilities import rank_zero_warn
from lightning_utilities import apply_to_collection
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, register_fsdp_forward_method
from torch.optim import Optimizer
from torchmetrics import MetricCollection
from transformers import PreTrainedTokenizerBase, get_scheduler

from akl_lightning.checkpoint import AtomicCheckpointIO, key_by_name, random_states, set_random_states
from akl_lightning.criterion import CriterionOutput, DistillationCriterion, as_mask
from akl_lightning.data.module import InstructionDataModule
from akl_lightning.data.sampler import accumulated
from akl_lightning.errors import UsageError
from akl_lightning.functional import log_probs
from akl_lightning.metrics import distillation_metrics
from akl_lightning.models import (
    Batch,
    LoraSettings,
    Precision,
    SplitModel,
    add_lora,
    check_same_vocabulary,
    load_causal_lm,
    tokenizer_of,
)
from akl_lightning.parallel import data_parallel_mesh, shard, wrapping_policy
from akl_lightning.projection import Logits, project_and_compare, rows_of
from akl_lightning.teachers.base import Teacher
from akl_lightning.teachers.cache import CACHE_PREFIX, CachedTeacher
from akl_lightning.teachers.live import LiveTeacher

LOOK_EVERY_N_STEPS = 10
"""Optimizer steps after which a loss that is NaN, or a request to stop, is noticed at the latest."""

ScheduleName = Literal["constant", "constant_with_warmup", "linear", "cosine"]


class MicroBatch(NamedTuple):
    """What is kept of a micro-batch until the optimizer steps."""

    batch_idx: int
    loss: Tensor
    cross_entropy: Tensor
    tokens: int


class Step(NamedTuple):
    """What is kept of an optimizer step until somebody looks at its loss."""

    number: int
    epoch: int
    micro_batches: list[MicroBatch]
    totals: Tensor
    """Loss, cross entropy, response tokens and requests to stop, summed over micro-batches and ranks."""


class DistillationModule(LightningModule):
    """Distil a frozen teacher into a student.

    The loss returned by :meth:`training_step` is a *sum* over the response tokens of the micro-batch. Once per
    optimizer step the gradients are divided by the number of response tokens of the whole step, over micro-batches
    and ranks, before any callback, hook or clipping sees them: the same samples give the same update however they are
    split. A subclass that adds a loss of its own adds a sum over tokens too.

    Logged: ``{train,val,test}/{loss,divergence,cross_entropy,fkl,rkl,head_error,tail_error,head_weight,
    top1_agreement}`` once an epoch, as means over all response tokens, and ``train/loss_step`` every step.

    Lightning's own callbacks and tools work with it, but for these: averages of weights (SWA, EMA) are not taken of a
    sharded student, the learning-rate finder compares summed losses and so wants samples that are not grouped by
    length, and the batch-size finder searches on one device only, from a data module.

    Args:
        student: what is trained: a hub name, a local folder, a ``transformers`` config mapping (new weights), some
            layers of another model (``{layers_of: models/large, keep: [0, 2, 4]}``), or a module. A module that is no
            ``transformers`` model is called with the batch and gives logits ``[batch, length, vocab]``.
        teacher: what it learns from, given in the same ways, or ``cache:`` and the folder that ``akl cache`` has
            written; None only with ``criterion.alpha = 0``.
        criterion: what a batch costs.
        optimizer: called with the trainable parameters.
        lr_scheduler: the name of a schedule of ``transformers`` that spans the whole run and is stepped with every
            optimizer step, or a callable that takes the optimizer and is stepped once an epoch.
        warmup_steps: optimizer steps of linear warm-up, for a schedule given by name.
        max_new_tokens: length of the answers that :meth:`predict_step` generates.
        trust_remote_code: run Python code that comes with the models.
        lora: train a LoRA adapter of the student alone, through PEFT.
        teacher_precision: of the weights of a teacher that is no module; 8bit and 4bit through bitsandbytes.
        attn_implementation: of both models, in the words of ``transformers``; None for its choice.
        compile: run the student's body through ``torch.compile``.
        packing: run both bodies on the samples of a micro-batch laid into fewer rows, which saves the padding; the
            samples see nothing of each other.

    Raises:
        UsageError: a model that cannot be had; models, data and tokenizers that do not fit together.
    """

    train_metrics: MetricCollection
    val_metrics: MetricCollection
    test_metrics: MetricCollection

    def __init__(
        self,
        student: nn.Module | dict[str, Any] | str,
        teacher: nn.Module | dict[str, Any] | str | None = None,
        criterion: DistillationCriterion = lazy_instance(DistillationCriterion),  # noqa: B008 (jsonargparse)
        optimizer: OptimizerCallable = torch.optim.AdamW,
        lr_scheduler: ScheduleName | LRSchedulerCallable = "constant",
        warmup_steps: int = 0,
        max_new_tokens: int = 64,
        trust_remote_code: bool = False,
        lora: LoraSettings | None = None,
        teacher_precision: Precision = "float32",
        attn_implementation: str | None = None,
        compile: bool = False,
        packing: bool = False,
    ) -> None:
        super().__init__()
        # Only plain data goes into a checkpoint. Under the command line that is the config; from a script, modules
        # and callables are left out and have to be given again to load_from_checkpoint.
        plain = {"student": student, "teacher": teacher}
        plain = {name: value for name, value in plain.items() if isinstance(value, str | dict | None)}
        names = ("warmup_steps", "max_new_tokens", "teacher_precision", "attn_implementation", "packing")
        self.save_hyperparameters(*plain, *names, logger=False)
        if lora is not None:
            lora = LoraSettings(**lora) if isinstance(lora, dict) else lora  # as a checkpoint has it
            self.save_hyperparameters({"lora": asdict(lora)}, logger=False)
        if teacher is None and criterion.needs_teacher:
            raise UsageError(f"criterion.alpha = {criterion.alpha} needs a teacher: give one, or set alpha to 0.")
        cached = isinstance(teacher, str) and teacher.startswith(CACHE_PREFIX)
        models = {"teacher": None if cached else teacher, "student": student}
        self._tokenizers = {name: tokenizer_of(model, trust_remote_code) for name, model in models.items()}
        if self._tokenizers["teacher"] and self._tokenizers["student"]:
            check_same_vocabulary(self._tokenizers["teacher"], self._tokenizers["student"])
        model = load_causal_lm(student, trust_remote_code, "student", attn_implementation=attn_implementation)
        self.student = SplitModel(model if lora is None else add_lora(model, lora), packing)
        if compile:
            self.student.compile_body()
        self.teacher: Teacher | None = None
        if isinstance(teacher, str) and cached:
            self.teacher = CachedTeacher(teacher.removeprefix(CACHE_PREFIX))
        elif teacher is not None:
            self.teacher = LiveTeacher(
                teacher,
                trust_remote_code,
                precision=teacher_precision,
                attn_implementation=attn_implementation,
                packing=packing,
            )
        self.criterion = criterion
        self.optimizer = optimizer
        self.lr_scheduler = lr_scheduler
        self.warmup_steps = warmup_steps
        self.max_new_tokens = max_new_tokens
        for stage in ("train", "val", "test"):
            self.add_module(f"{stage}_metrics", distillation_metrics(f"{stage}/", with_teacher=teacher is not None))
        self.lr: float | None = None
        """Learning rate of all parameter groups in place of the optimizer's own, or None; Lightning's finder sets it. A
        subclass that overrides :meth:`configure_optimizers` reads it there."""
        self._window: list[MicroBatch] = []
        self._unseen: list[Step] = []
        self._random_states: list[dict[str, Any]] = []
        self.stop_requested = False
        """Set it on any rank, from a signal handler too, to have :attr:`stop_agreed` on all of them soon."""
        self.stop_agreed = False
        """Whether all ranks know, since the same optimizer step, that one of them wants to stop."""

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        # The teacher is no submodule, yet it has to be where the student is.
        super()._apply(fn, recurse)
        if self.teacher is not None and (parameter := next(self.student.parameters(), None)) is not None:
            self.teacher.to(parameter.device)
        return self

    # ----------------------------------------------------------------------------------------------------------------
    # Checks before any work

    def configure_callbacks(self) -> list[Callback]:
        """Add none, but refuse those that cannot work, before any of them is set up."""
        data = getattr(self.trainer, "datamodule", None)
        for callback in self.trainer.callbacks:  # type: ignore[attr-defined]
            name = type(callback).__name__
            averages = isinstance(callback, StochasticWeightAveraging | WeightAveraging)
            if averages and isinstance(self.trainer.strategy, ModelParallelStrategy | FSDPStrategy):
                raise UsageError(f"{name} cannot average a sharded student: use the strategy ddp, or remove it.")
            if isinstance(callback, LearningRateFinder) and getattr(data, "group_by_length", False):
                raise UsageError(
                    f"{name} compares the summed losses of batches, which samples grouped by length set far apart: set "
                    "data.group_by_length to false while it searches."
                )
        return []

    def setup(self, stage: str) -> None:
        """Check that student, teacher and data fit together."""
        if self.trainer.strategy.root_device.type == "mps":
            raise UsageError("MPS has no float64, in which sums over tokens are kept: give trainer.accelerator cpu.")
        if type(self.trainer.strategy.checkpoint_io) is TorchCheckpointIO:
            self.trainer.strategy.checkpoint_io = AtomicCheckpointIO()
        if stage == "fit":  # nothing of a fit that was broken off
            self._window, self._unseen, self._random_states = [], [], []
            self.stop_requested = self.stop_agreed = False
            self.train_metrics.reset()
        if self.trainer.world_size > 1:  # torchmetrics has averaged over ranks what Lightning would like to
            warnings.filterwarnings("ignore", message=r".*self\.log\('(train|val|test)/.*sync_dist=True")
        models: dict[str, SplitModel | Teacher] = {"student": self.student}
        if self.teacher is not None:
            models["teacher"] = self.teacher
        data = getattr(self.trainer, "datamodule", None)
        tokenizer = getattr(data, "tokenizer", None)
        sizes = {name: model.vocab_size for name, model in models.items() if model.vocab_size}
        for name, model in models.items():
            if tokenizer is not None and (own := self._tokenizers[name]) is not None:
                check_same_vocabulary(own, tokenizer, (name, "data"))
            model.check_fits(name, tokenizer, getattr(data, "max_length", None))
        if stage == "predict" and isinstance(data, InstructionDataModule):
            positions = self.student.max_positions
            data.check_answers_fit(data.predict_split, "model.max_new_tokens", self.max_new_tokens, positions)
        known = any(self._tokenizers.values()) or tokenizer is not None
        if len(set(sizes.values())) > 1 and not known:
            raise UsageError(
                f"student and teacher have {sizes['student']} and {sizes['teacher']} outputs and no tokenizer tells "
                f"whether token {min(sizes.values())} is padding: give models of one vocabulary, or a data module "
                "with their tokenizer."
            )
        if self.teacher is not None:
            self.teacher.check_run(stage, self.trainer, self.criterion)

    # No property named tokenizer, which subclasses like to set.
    def find_tokenizer(self) -> PreTrainedTokenizerBase | None:
        """The data module's, else the one that lies beside student or teacher, or None."""
        data = None if self._trainer is None else getattr(self.trainer, "datamodule", None)
        return getattr(data, "tokenizer", None) or self._tokenizers["student"] or self._tokenizers["teacher"]

    @property
    def in_step(self) -> bool:
        """Whether micro-batches have been accumulated that no optimizer step has used yet."""
        return bool(self._window)

    def configure_model(self) -> None:
        """Read the teacher's weights; shard teacher and module where the strategy shards."""
        strategy = None if self._trainer is None else self._trainer.strategy  # load_from_checkpoint has none
        mesh = data_parallel_mesh(strategy)
        if self.teacher is not None and not (strategy and self.trainer.predicting):
            self.teacher.load(mesh)
        if isinstance(strategy, FSDPStrategy):  # which wraps the module itself
            strategy.kwargs.setdefault("auto_wrap_policy", wrapping_policy(self.student.model))
        elif mesh is not None and not isinstance(self, FSDPModule):
            if getattr(strategy, "activation_checkpointing", False):
                self.student.checkpoint_activations()
            shard(self, mesh, self.student.model)
            methods = ("training_step", "validation_step", "test_step", "predict_step", "generate", "distributions")
            for step in methods:
                register_fsdp_forward_method(self, step)

    # ----------------------------------------------------------------------------------------------------------------
    # Steps

    def forward(self, batch: Batch) -> Tensor:
        """The student's logits ``[batch, length, vocab]``."""
        return self.student(batch)

    def distill(self, batch: Batch) -> CriterionOutput:
        """Compare student and teacher on a batch of ``input_ids``, ``attention_mask`` and ``labels``."""
        for key in ("input_ids", "attention_mask", "labels"):
            if key not in batch:
                raise UsageError(f"the batch has no {key!r}, only {list(batch)}: let the DataLoader yield all three.")
        positions, labels = self.criterion.response_positions(batch["labels"])
        positions = as_mask(positions, batch["labels"])
        with_gradient = torch.is_grad_enabled()

        def beside(teacher: Logits | None) -> CriterionOutput:
            with torch.set_grad_enabled(with_gradient):
                return self.student(batch, positions, lambda student: self.compare(student, teacher, labels))

        # One inside the other, so that both heads' weights are at hand, gathered once, however they are sharded.
        return beside(None) if self.teacher is None else self.teacher(batch, positions, beside)

    def compare(self, student: Logits, teacher: Logits | None, labels: Tensor) -> CriterionOutput:
        """What the response tokens of a batch cost; the place for a loss of one's own on hidden states.

        Args:
            student: logits ``[tokens, vocab]`` or, of a model that splits into body and head, their
                :class:`~akl_lightning.projection.Projection`, whose ``hidden`` is ``[tokens, hidden]``.
            teacher: likewise, without gradient, live or from a cache; None without a teacher.
            labels: ``[tokens]``, the tokens of the data.
        """
        return self.criterion(student, teacher, labels)

    @torch.no_grad()
    def distributions(self, batch: Batch, tokens: slice) -> tuple[Tensor, Tensor]:
        """Student's and teacher's distributions at a few response positions, softened as the criterion's, to look at.

        Only these tokens are projected onto the vocabulary. Every rank has to call it where models are sharded.

        Args:
            batch: ``input_ids``, ``attention_mask`` and ``labels``, as for training.
            tokens: which of the batch's response tokens.

        Returns:
            Probabilities of student and teacher, each ``[tokens, vocab]``, cut to the common vocabulary.

        Raises:
            UsageError: no teacher.
        """
        if self.teacher is None:
            raise UsageError("the module has no teacher: give it one to compare the student with.")
        # A cache finds a sample by all of its response positions.
        positions, labels = self.criterion.response_positions(batch["labels"])
        positions = as_mask(positions, batch["labels"])
        pairs: list[tuple[Tensor, Tensor]] = []

        def keep(student: Tensor, teacher: Tensor | None, labels: Tensor, gradient: Tensor | None) -> dict[str, Tensor]:
            assert teacher is not None
            temperature = self.criterion.temperature
            pairs.append((log_probs(student, temperature).exp(), log_probs(teacher, temperature).exp()))
            return {"loss": student.new_zeros(len(labels))}

        def beside(teacher: Logits) -> None:
            def compare(student: Logits) -> None:
                project_and_compare(rows_of(student, tokens), rows_of(teacher, tokens), labels[tokens], keep)

            self.student(batch, positions, compare)

        self.teacher(batch, positions, beside)
        student, teacher = (torch.cat(side) for side in zip(*pairs, strict=True))
        return student, teacher

    def training_step(self, batch: Batch, batch_idx: int) -> dict[str, Any]:
        """Loss (a sum over response tokens) and per-token statistics, which callbacks find in ``outputs``."""
        output = self.distill(batch)
        self.train_metrics.update(**output.statistics)
        cross_entropy = output.statistics["cross_entropy"]
        self._window.append(MicroBatch(batch_idx, output.loss.detach(), cross_entropy.sum(), cross_entropy.numel()))
        return {"loss": output.loss, "statistics": output.statistics}

    def validation_step(self, batch: Batch, batch_idx: int) -> dict[str, Any]:
        """Feed the validation metrics; statistics as in :meth:`training_step`."""
        return self._evaluation_step(batch, self.val_metrics)

    def test_step(self, batch: Batch, batch_idx: int) -> dict[str, Any]:
        """Feed the test metrics; statistics as in :meth:`training_step`."""
        return self._evaluation_step(batch, self.test_metrics)

    def _evaluation_step(self, batch: Batch, metrics: MetricCollection) -> dict[str, Any]:
        output = self.distill(batch)
        metrics.update(**output.statistics)
        return {"loss": output.loss, "statistics": output.statistics}

    def predict_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """The student's greedy answers to left-padded prompts: token ids ``[batch, new_tokens]``."""
        return self.generate(batch, max_new_tokens=self.max_new_tokens)

    def generate(self, prompts: Batch, **arguments: Any) -> Tensor:
        """The student's answers; see :meth:`~akl_lightning.models.SplitModel.generate`."""
        # Where layers are gathered from all ranks, none may stop before the others have.
        return self.student.generate(
            prompts, self.find_tokenizer(), **arguments, synced_gpus=isinstance(self, FSDPModule)
        )

    def on_train_epoch_end(self) -> None:
        """Log the epoch's training means."""
        self._look_at_losses()
        self._log_means(self.train_metrics)

    def on_validation_epoch_end(self) -> None:
        """Log the validation means."""
        self._log_means(self.val_metrics)
        self._release()

    def on_test_epoch_end(self) -> None:
        """Log the test means."""
        self._log_means(self.test_metrics)
        self._release()

    def on_predict_epoch_end(self) -> None:
        """Free what the last forward has gathered."""
        self._release()

    def _release(self) -> None:
        # What is gathered for a forward is freed by its backward, and here is none.
        if isinstance(self, FSDPModule):
            self.reshard()

    def _log_means(self, metrics: MetricCollection) -> None:
        self.log_dict({name: mean.float() for name, mean in metrics.compute().items()})
        metrics.reset()

    # ----------------------------------------------------------------------------------------------------------------
    # Optimization

    def configure_optimizers(self) -> Any:
        """The optimizer over all trainable parameters, and its schedule.

        Raises:
            UsageError: the optimizer does not accept one of its arguments.
        """
        parameters = [parameter for parameter in self.parameters() if parameter.requires_grad]
        try:
            optimizer = self.optimizer(parameters)
        except ValueError as error:
            raise UsageError(f"model.optimizer does not accept an argument: {error}; give another value.") from error
        if self.lr is not None:
            for group in optimizer.param_groups:
                group["lr"] = self.lr
        if isinstance(self.lr_scheduler, str):
            steps = None if self.lr_scheduler.startswith("constant") else self._steps_of_run()
            scheduler = get_scheduler(self.lr_scheduler, optimizer, self.warmup_steps, steps)
            return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}
        scheduler = self.lr_scheduler(optimizer)
        config: dict[str, Any] = {"scheduler": scheduler}
        if isinstance(scheduler, ReduceLROnPlateau):
            config["monitor"] = scheduler.monitor
        return {"optimizer": optimizer, "lr_scheduler": config}

    def _steps_of_run(self) -> int:
        trainer = self.trainer
        steps = trainer.estimated_stepping_batches  # which loads the data, and knows no GradientAccumulationScheduler
        batches, epochs = trainer.num_training_batches, trainer.max_epochs or 0
        if epochs > 0 and math.isfinite(batches):
            counted = sum(math.ceil(batches / accumulated(trainer, epoch)) for epoch in range(epochs))
            steps = counted if trainer.max_steps == -1 else min(counted, trainer.max_steps)
        if not 0 <= steps < math.inf:
            raise UsageError(
                f"the schedule {self.lr_scheduler!r} spans the whole run, which has no end that is known: set "
                "trainer.max_steps, or take lr_scheduler constant."
            )
        return int(steps)

    def optimizer_step(
        self,
        epoch: int,
        batch_idx: int,
        optimizer: Optimizer | LightningOptimizer,
        optimizer_closure: Callable[[], Any] | None = None,
    ) -> None:
        """Step with gradients that are means over all response tokens of the step."""

        def closure() -> Any:
            loss = optimizer_closure() if optimizer_closure is not None else None
            self._average_gradients()
            return loss

        super().optimizer_step(epoch, batch_idx, optimizer, closure)

    def _average_gradients(self) -> None:
        """Turn summed gradients into means over the tokens of the step: all its micro-batches, all ranks."""
        window, self._window = self._window, []
        losses = torch.stack([micro_batch.loss.double() for micro_batch in window]).sum()
        cross_entropies = torch.stack([micro_batch.cross_entropy.double() for micro_batch in window]).sum()
        tokens = losses.new_tensor(sum(micro_batch.tokens for micro_batch in window))
        mine = torch.stack([losses, cross_entropies, tokens, losses.new_tensor(self.stop_requested)])
        totals = self.trainer.strategy.reduce(mine, reduce_op="sum")
        self._unseen.append(Step(self.trainer.global_step, self.current_epoch, window, totals))
        # Looking waits for the device, which is not done at every step.
        if totals.device.type == "cpu" or len(self._unseen) >= LOOK_EVERY_N_STEPS:
            self._look_at_losses()
        loss, tokens = totals[0], totals[2].clamp(min=1)
        # Lightning has divided each loss by the micro-batches of a step, and DDP and FSDP the sum by the ranks.
        factor = self.trainer.accumulate_grad_batches * self.trainer.world_size / tokens
        gradients = [parameter.grad for parameter in self.parameters() if parameter.grad is not None]
        if gradients:
            torch._foreach_mul_(gradients, factor.to(gradients[0].dtype))
        self.log("train/loss_step", (loss / tokens).float(), prog_bar=True, on_step=True, on_epoch=False)

    def _look_at_losses(self) -> None:
        """Stop where a loss was NaN. The sums are the same on all ranks, so none waits for one that has stopped."""
        steps, self._unseen = self._unseen, []
        for step in steps:
            loss, cross_entropy, _, stop = step.totals.tolist()
            self.stop_agreed |= stop > 0
            if not math.isnan(loss):
                continue
            where = ", ".join(str(batch.batch_idx) for batch in step.micro_batches if batch.loss.isnan())
            # Cross entropy knows no teacher.
            culprit, advice = (
                ("the student diverged", "look at that batch, lower the learning rate, or clip")
                if math.isnan(cross_entropy)
                else ("the teacher gives NaN", "look at that batch, or load the teacher in a wider precision")
            )
            raise UsageError(
                f"the loss is NaN at optimizer step {step.number}, epoch {step.epoch}, batch "
                f"{where or 'of another rank'}; {culprit}: {advice}."
            )

    def configure_gradient_clipping(
        self,
        optimizer: Optimizer,
        gradient_clip_val: int | float | None = None,
        gradient_clip_algorithm: str | None = None,
    ) -> None:
        """Clip, by the norm over all shards under FSDP too."""
        by_norm = gradient_clip_val is not None and gradient_clip_algorithm in (None, "norm")
        if by_norm and isinstance(self.trainer.strategy, FSDPStrategy):  # whose precision plugin refuses it
            self.trainer.strategy.model.clip_grad_norm_(gradient_clip_val)  # type: ignore[operator, union-attr]
        else:
            self.clip_gradients(optimizer, gradient_clip_val, gradient_clip_algorithm)

    # ----------------------------------------------------------------------------------------------------------------
    # Checkpoints: what Lightning's own leave out

    def on_fit_start(self) -> None:
        """Get ready for what is restored next: the place in the data, optimizer states by parameter names."""
        # Whoever has asked for trainer.estimated_stepping_batches has made the Trainer load the data, and once it has,
        # it forgets to restore where they were.
        self.trainer.fit_loop._combined_loader = None
        callbacks = self.trainer.callbacks  # type: ignore[attr-defined]
        if self.lr is not None and any(isinstance(callback, LearningRateFinder) for callback in callbacks):
            # The finder sets the optimizer's rate, and a schedule would set it back to what it was made with.
            self.trainer.strategy.setup_optimizers(self.trainer)
        if not isinstance(self.trainer.strategy, FSDPStrategy):  # which has its own way to gather them
            for optimizer in self.trainer.optimizers:
                key_by_name(optimizer, self)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Add the epoch's means so far, each rank's random numbers, and which teacher a cache stands for."""
        self._look_at_losses()
        if self.teacher is not None and self.teacher.fingerprint is not None:
            checkpoint["teacher"] = self.teacher.fingerprint
        if self.in_step:
            rank_zero_warn(
                f"checkpoint in the middle of an optimizer step: its {len(self._window)} micro-batches so far are "
                "missing from a run that resumes there. Save after whole steps, as LastCheckpoint does."
            )
        checkpoint["dealt"] = self._dealt(self.current_epoch)
        begun = self.trainer.fit_loop.epoch_loop.batch_progress.current.ready > 0
        checkpoint["within_epoch"] = begun and not self.trainer.is_last_batch
        checkpoint["random_states"] = [random_states()]
        if self.trainer.world_size > 1:
            checkpoint["random_states"] *= self.trainer.world_size
            torch.distributed.all_gather_object(checkpoint["random_states"], random_states())
        checkpoint["train_metrics"] = {}
        for name, metric in self.train_metrics.items(keep_base=True):
            with metric.sync_context():
                state = apply_to_collection(metric.metric_state, Tensor, Tensor.cpu)
                checkpoint["train_metrics"][name] = state

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Take up the epoch's means; random numbers wait until training starts.

        Raises:
            UsageError: the checkpoint is of another student, or of a run with the cache of another teacher.
        """
        weights = checkpoint.get("state_dict")
        if self._trainer is not None and self.strict_loading and weights is not None:
            own, theirs = (
                {name: getattr(value, "shape", None) for name, value in of.items()}
                for of in (self.state_dict(), weights)
            )
            odd = [name for name in {**own, **theirs} if own.get(name) != theirs.get(name)]
            if odd:
                raise UsageError(
                    f"the checkpoint is of another student, they differ in {odd[0].removeprefix('student.')}: give "
                    "model.student as it was in that run, or another checkpoint."
                )
        ours = None if self.teacher is None else self.teacher.fingerprint
        if ours is not None and checkpoint.get("teacher", ours) != ours:
            raise UsageError(
                "the checkpoint was trained with the cache of another teacher, its weights differ: give model.teacher "
                "that cache, or start a new run."
            )
        if self._trainer is None or self._trainer.state.fn != "fit":
            return
        dealt = self._dealt(checkpoint["epoch"])
        if checkpoint.get("within_epoch") and checkpoint.get("dealt", dealt) != dealt:
            raise UsageError(
                f"the checkpoint lies within an epoch whose samples were dealt to {checkpoint['dealt']}, not to "
                f"{dealt}: go on with the same, or from a checkpoint at the end of an epoch."
            )
        # Lightning's finders try some steps before the run, and then go back to where they were.
        self._window, self._unseen = [], []
        self.train_metrics.reset()
        self._random_states = checkpoint.get("random_states", [])
        if self._trainer.is_global_zero:  # sums over ranks, so one of them has it all
            for name, state in checkpoint.get("train_metrics", {}).items():
                if name not in self.train_metrics:
                    continue
                metric = self.train_metrics[name]
                metric.update()
                metric.merge_state({key: value.to(metric.device) for key, value in state.items()})

    def _dealt(self, epoch: int) -> str:
        data = getattr(self.trainer, "datamodule", None)
        return (
            f"{self.trainer.world_size} processes x {getattr(data, 'batch_size', '?')} samples x "
            f"{accumulated(self.trainer, epoch)} accumulated"
        )

    @classmethod
    def load_from_checkpoint(cls, checkpoint_path: Any, weights_only: bool | None = True, **kwargs: Any) -> Any:  # type: ignore[override]
        """As Lightning's, but what a checkpoint holds is not run unless ``weights_only=False`` is given.

        Raises:
            UsageError: a damaged file, of which an older good one is named; a model that has moved.
        """
        if isinstance(checkpoint_path, str | Path):
            AtomicCheckpointIO().load_checkpoint(checkpoint_path, weights_only=weights_only)
        return super().load_from_checkpoint(checkpoint_path, weights_only=weights_only, **kwargs)

    def on_train_start(self) -> None:
        """Go on with the accumulation and the random numbers of the run that is resumed."""
        self.trainer.accumulate_grad_batches = accumulated(self.trainer, self.current_epoch)
        if self.trainer.global_rank < len(self._random_states):
            set_random_states(self._random_states[self.trainer.global_rank])
        self._random_states = []
