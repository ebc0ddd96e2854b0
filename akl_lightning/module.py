"""The LightningModule that users run or subclass."""

from collections.abc import Callable, Mapping
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any, Self

import torch
from jsonargparse import lazy_instance
from lightning.pytorch import LightningModule
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from lightning.pytorch.plugins.io import TorchCheckpointIO
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.optim import Optimizer
from torchmetrics import MetricCollection
from transformers import PreTrainedTokenizerBase

from akl_lightning.batch import KEYS, Batch, response_of, turns_of
from akl_lightning.checkpoint_io import AtomicCheckpointIO
from akl_lightning.checks import check_batch, check_callbacks, check_run, leave_out_what_does_not_apply
from akl_lightning.compat import trainer_of
from akl_lightning.criterion import CriterionOutput, DistillationCriterion
from akl_lightning.data.facts import facts_of_run
from akl_lightning.errors import UsageError
from akl_lightning.frozen import FrozenWeights
from akl_lightning.metrics import add_metrics, log_means, log_sets, metrics_of_set
from akl_lightning.models.inputs import lay_out
from akl_lightning.models.load import Precision, load_causal_lm
from akl_lightning.models.lora import LoraSettings, add_lora
from akl_lightning.models.packing import pack
from akl_lightning.models.split import SplitModel
from akl_lightning.models.vocabulary import check_same_vocabulary, name_of, tokenizer_of
from akl_lightning.optimization import ScheduleName, make_optimizer
from akl_lightning.parallel import clip_gradients, data_parallel_mesh, shard_module
from akl_lightning.projection import Logits, rows_of
from akl_lightning.resume import Resume
from akl_lightning.rollouts import OnPolicy, choose_rollouts
from akl_lightning.teachers.aligned import Alignment, told_apart, with_own_tokenizer
from akl_lightning.teachers.choose import choose_teacher, has_own_model
from akl_lightning.token_mean import StepMean, with_router_loss
from akl_lightning.tokenizers.bytes import bytes_of, lengths


class DistillationModule(LightningModule):
    """Distil a frozen teacher into a student.

    The loss that a step returns is a *sum* over the response tokens of the micro-batch. Once per optimizer step the
    gradients are divided by the response tokens of the whole step, over micro-batches and ranks, before any callback,
    hook or clipping sees them: the same samples give the same update however they are split. A subclass that adds a
    loss of its own adds a sum over tokens too.

    Logged: ``{train,val,test}/{loss,divergence,cross_entropy,fkl,rkl,head_error,tail_error,head_weight,
    top1_agreement}`` once an epoch, as means over all response tokens, and ``train/loss_step`` every step; of several
    turns each one's, ``{val,test}/turn_1/{head_error,tail_error}`` and so on. Of a mixture of experts whose config asks
    for its router's loss (``output_router_logits``), that is added as ``transformers`` weighs it, times the response
    tokens of a micro-batch, and logged as ``router_loss``, which alone depends on how samples are split into those.

    Several sets of validation or test samples, a list or mapping of loaders, are each logged under their own name, as
    ``val/NAME/...`` (a mapping's key, a list's number from 0); the first as ``val/...``, too, where ``monitor`` looks.

    Lightning's own callbacks and tools work with it, but: averages of weights (SWA, EMA) are not taken of a sharded
    student, the learning-rate finder wants samples not grouped by length, the batch-size finder a data module.

    Args:
        student: what is trained: a hub name, a local folder, a ``transformers`` config mapping (new weights), some
            layers of another model (``{layers_of: models/large, keep: [0, 2, 4]}``), or a module. A module that is no
            ``transformers`` model is called with the batch and gives logits ``[batch, length, vocab]``. Of a name or
            folder with an adapter, the adapter is trained.
        teacher: what it learns from, given in the same ways (a module is frozen in place and put into eval mode), or
            ``cache:`` and the folder that ``akl cache`` has written, or ``base`` for the model under the student's
            adapter; None only with ``criterion.alpha = 0``.
        criterion: what a batch costs.
        optimizer: called with the trainable parameters; an Adam without ``lr`` gets one by what is trained.
        lr_scheduler: the name of a schedule of ``transformers`` that spans the whole run and is stepped with every
            optimizer step, or a callable that takes the optimizer and is stepped once an epoch.
        warmup_steps: optimizer steps of linear warm-up, for a schedule given by name.
        max_new_tokens: length of the answers that :meth:`predict_step` generates.
        trust_remote_code: run Python code that comes with the models.
        lora: train a LoRA adapter of the student alone, through PEFT.
        teacher_precision: of the weights of a teacher that is no module; auto for their own, 8bit and 4bit are made.
        attn_implementation: of both models, in the words of ``transformers``; None for its choice.
        compile: run the student's body through ``torch.compile``.
        packing: lay the samples of a micro-batch into fewer rows, for both bodies; they see nothing of each other.
        activation_checkpointing: keep only the inputs of the student's layers and run them again in the backward pass.
        save_frozen: keep in checkpoints what is frozen and lies under the student's name; else they hold its digest.
        on_policy: let the student answer some prompts anew in every step, and learn from the teacher on its answers.
        alignment: what is done about a teacher with another tokenizer: compare ``classes`` of tokens where both stand
            at the same byte of a text, or ``refuse`` it.

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
        teacher_precision: Precision = "auto",
        attn_implementation: str | None = None,
        compile: bool = False,
        packing: bool = False,
        activation_checkpointing: bool = False,
        save_frozen: bool = False,
        on_policy: OnPolicy | None = None,
        alignment: Alignment = "classes",
    ) -> None:
        super().__init__()
        # Only plain data goes into a checkpoint. Under the command line that is the config; from a script, modules
        # and callables are left out and have to be given again to load_from_checkpoint.
        plain = [n for n, v in (("student", student), ("teacher", teacher)) if isinstance(v, str | dict | None)]
        names = ("warmup_steps", "max_new_tokens", "teacher_precision", "attn_implementation", "packing", "save_frozen")
        self.save_hyperparameters(*plain, *names, "alignment", logger=False)
        if lora is not None:
            lora = LoraSettings(**lora) if isinstance(lora, dict) else lora  # as a checkpoint has it
            self.save_hyperparameters({"lora": asdict(lora)}, logger=False)
        if teacher is None and criterion.train().needs_teacher:  # a call builds the default, which comes unbuilt
            raise UsageError(f"criterion.alpha = {criterion.alpha} needs a teacher: give one, or set alpha to 0.")
        models = {"teacher": teacher if has_own_model(teacher) else None, "student": student}
        self.model_tokenizers = {name: tokenizer_of(model, trust_remote_code) for name, model in models.items()}
        if alignment == "refuse" and self.model_tokenizers["teacher"] and self.model_tokenizers["student"]:
            check_same_vocabulary(self.model_tokenizers["teacher"], self.model_tokenizers["student"])
        model = load_causal_lm(student, trust_remote_code, "student", attn_implementation=attn_implementation)
        found_again = not save_frozen and not isinstance(student, nn.Module) and name_of(student) is not None
        read = {id(parameter) for parameter in model.parameters()} if found_again else set()
        self.student = SplitModel(model if lora is None else add_lora(model, lora), packing)
        self.frozen_weights = FrozenWeights(self, read)
        if activation_checkpointing:
            self.student.checkpoint_activations()
        if compile:
            self.student.compile_body()
        self.teacher = choose_teacher(teacher, self.student, trust_remote_code, teacher_precision, attn_implementation)
        self.alignment, self.tokens = alignment, bytes_of(None)
        self.criterion = criterion
        self.optimizer = optimizer
        self.lr_scheduler, self.warmup_steps = lr_scheduler, warmup_steps
        self.max_new_tokens = max_new_tokens
        add_metrics(self, teacher is not None, self.student.has_router_loss)
        self.rollouts = choose_rollouts(self, on_policy)
        self.lr: float | None = None
        """Learning rate of all parameter groups in place of the optimizer's own, or None; Lightning's finder sets it. A
        subclass that overrides :meth:`configure_optimizers` reads it there."""
        self.step_mean = StepMean()
        self.resume = Resume(self)
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

    def setup(self, stage: str) -> None:
        """Check that student, teacher and data fit together."""
        check_callbacks(self.trainer)
        self.teacher, self.tokens = with_own_tokenizer(self, stage), bytes_of(self.find_tokenizer())
        check_run(self, stage)
        self.frozen_weights.look()
        if type(self.trainer.strategy.checkpoint_io) is TorchCheckpointIO:
            self.trainer.strategy.checkpoint_io = AtomicCheckpointIO()
        if stage == "fit":  # nothing of a fit that was broken off
            for part in (self.step_mean, self.resume, self.rollouts):
                part.forget()
            self.stop_requested = self.stop_agreed = False
            self.train_metrics.reset()
        leave_out_what_does_not_apply(self.trainer)

    # No property named tokenizer, which subclasses like to set.
    def find_tokenizer(self) -> PreTrainedTokenizerBase | None:
        """The data module's, else the one that lies beside student or teacher, or None."""
        of_data = facts_of_run(trainer_of(self)).tokenizer
        return of_data or self.model_tokenizers["student"] or self.model_tokenizers["teacher"]

    @property
    def in_step(self) -> bool:
        """Whether micro-batches have been accumulated that no optimizer step has used yet."""
        return len(self.step_mean) > 0

    def configure_model(self) -> None:
        """Read the teacher's weights; shard teacher and module where the strategy shards."""
        trainer = trainer_of(self)  # load_from_checkpoint has none
        strategy = None if trainer is None else trainer.strategy
        mesh = data_parallel_mesh(strategy)
        self.rollouts.outline(mesh)
        if self.teacher is not None and not (trainer and trainer.predicting):
            self.teacher.load(mesh)
        steps = ("training_step", "validation_step", "test_step", "predict_step", "generate", "distributions")
        shard_module(self, self.student.model, strategy, mesh, steps)

    def forward(self, batch: Batch) -> Tensor:
        """The student's logits ``[batch, length, vocab]``."""
        return self.student(batch)

    def on_before_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        """Find on the host what would have to be waited for on a GPU."""
        return self.prepare_batch(batch) if isinstance(batch, Mapping) and batch.keys() >= set(KEYS) else batch

    def prepare_batch(self, batch: Batch) -> dict[str, Any]:
        """Add to a batch what is found from it on the host: a subclass with a transfer hook of its own calls it there.

        Args:
            batch: ``input_ids``, ``attention_mask`` and ``labels``, each ``[batch, length]``; whatever else a model's
                forward knows (``position_ids``, ``pixel_values``, …) is passed on to it.

        Returns:
            The batch with ``response``, ``layout`` and, where samples are packed, ``packed``; what the teacher adds.

        Raises:
            UsageError: one of the three is missing, or a model or the teacher's cache does not know what they hold.
        """
        batch = self.rollouts.answer(batch)  # from here on nobody can tell
        response = response_of(batch, self.criterion)
        check_batch(self, batch)
        self.student.check_inputs(batch, "student")
        prepared = {**batch, "response": response, "layout": lay_out(batch), **lengths(self.tokens, batch, response)}
        prepared |= self.rollouts.prepare(batch, response)
        if self.student.packing:
            prepared["packed"] = pack(batch)
        return prepared if self.teacher is None else prepared | self.teacher.prepare(batch, response.positions)

    def distill(self, batch: Batch) -> CriterionOutput:
        """Compare student and teacher on a batch of ``input_ids``, ``attention_mask`` and ``labels``.

        In training it counts the response tokens, by which the gradients of the optimizer step are divided.
        """
        if "response" not in batch:
            batch = self.prepare_batch(batch)
        positions, labels = batch["response"]
        try:
            teacher = None if self.teacher is None else self.teacher(batch, positions)
            student = self.student(batch, positions)
            output = told_apart(self.rollouts.compare(self, batch, student, teacher, labels), batch)
            output = with_router_loss(output, self.student.take_router_loss())
        finally:
            if self.teacher is not None:
                self.teacher.release()
        if torch.is_grad_enabled() and (trainer := trainer_of(self)) is not None and trainer.training:
            self.step_mean.add(trainer.fit_loop.batch_idx, output.loss, output.statistics["cross_entropy"])
        return output

    def compare(
        self, student: Logits, teacher: Logits | None, labels: Tensor, alpha: Tensor | None = None
    ) -> CriterionOutput:
        """What the response tokens of a batch cost; the place for a loss of one's own on hidden states.

        Args:
            student: logits ``[tokens, vocab]`` or, of a model that splits into body and head, their
                :class:`~akl_lightning.projection.Projection`, whose ``hidden`` is ``[tokens, hidden]``.
            teacher: likewise, without gradient, live or from a cache; None without a teacher.
            labels: ``[tokens]``, the tokens of the data.
            alpha: ``[tokens]``, the weight of the divergence where it is not the criterion's at all of them.
        """
        return self.criterion(student, teacher, labels, alpha)

    @torch.no_grad()
    def distributions(self, batch: Batch, tokens: slice) -> tuple[Tensor, Tensor]:
        """Student's and teacher's distributions at a few response positions, softened as the criterion's, to look at.

        Every rank has to call it where models are sharded.

        Args:
            batch: as for training.
            tokens: which of its response tokens; only these are projected onto the vocabulary.

        Returns:
            Probabilities of student and teacher, each ``[tokens, vocab]``, cut to the common vocabulary.
        """
        if self.teacher is None:
            raise UsageError("the module has no teacher: give it one to compare the student with.")
        if "response" not in batch:
            batch = self.prepare_batch(batch)
        positions, labels = batch["response"]
        try:
            teacher, student = self.teacher(batch, positions), self.student(batch, positions)
            return self.criterion.distributions(rows_of(student, tokens), rows_of(teacher, tokens), labels[tokens])
        finally:
            self.teacher.release()

    def training_step(self, batch: Batch, batch_idx: int) -> dict[str, Any]:
        """Loss (a sum over response tokens) and per-token statistics, which callbacks find in ``outputs``."""
        return self._step(batch, self.train_metrics)

    def validation_step(self, batch: Batch, batch_idx: int, dataloader_idx: int = 0) -> dict[str, Any]:
        """Feed the validation metrics of this set of samples; statistics as in :meth:`training_step`."""
        outputs = self._step(batch, metrics_of_set(self, "val", dataloader_idx))
        self.rollouts.look(batch, batch_idx, dataloader_idx)
        return outputs

    def test_step(self, batch: Batch, batch_idx: int, dataloader_idx: int = 0) -> dict[str, Any]:
        """Feed the test metrics of this set of samples; statistics as in :meth:`training_step`."""
        return self._step(batch, metrics_of_set(self, "test", dataloader_idx))

    def _step(self, batch: Batch, metrics: MetricCollection) -> dict[str, Any]:
        output = self.distill(batch)
        more = self.rollouts.statistics(batch, output.statistics) | turns_of(batch, self.criterion)
        metrics.update(**output.statistics | more)
        return {"loss": output.loss, "statistics": output.statistics}

    def predict_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """The student's greedy answers to left-padded prompts: token ids ``[batch, new_tokens]``."""
        return self.generate(batch, max_new_tokens=self.max_new_tokens)

    def generate(self, prompts: Batch, **arguments: Any) -> Tensor:
        """The student's answers; see :meth:`~akl_lightning.models.split.SplitModel.generate`."""
        # Where layers are gathered from all ranks, none may stop before the others have.
        together, ends = isinstance(self, FSDPModule), facts_of_run(trainer_of(self)).end_tokens
        return self.student.generate(prompts, self.find_tokenizer(), ends, **arguments, synced_gpus=together)

    def on_train_batch_end(self, outputs: Any, batch: Batch, batch_idx: int) -> None:
        """Count nothing of a batch for which :meth:`training_step` has returned None."""
        if self.automatic_optimization and not outputs:
            self.step_mean.leave_out(batch_idx)
        self.rollouts.end_batch()

    def on_train_epoch_end(self) -> None:
        """Log the epoch's training means."""
        self.step_mean.check(self)
        log_means(self, self.train_metrics)

    def on_validation_epoch_end(self) -> None:
        """Log the validation means."""
        log_sets(self, "val")
        self.rollouts.end_validation()
        self._release()

    def on_test_epoch_end(self) -> None:
        """Log the test means."""
        log_sets(self, "test")
        self._release()

    def _release(self) -> None:
        """Free what the last forward has gathered: there is no backward that does it."""
        if isinstance(self, FSDPModule):
            self.reshard()

    on_predict_epoch_end = _release

    def teardown(self, stage: str) -> None:
        """Free what sampling has kept."""
        self.rollouts.release()

    def configure_optimizers(self) -> Any:
        """The optimizer over all trainable parameters, and its schedule."""
        return make_optimizer(self)

    def optimizer_step(
        self, epoch: int, batch_idx: int, optimizer: Any, optimizer_closure: Callable[[], Any] | None = None
    ) -> None:
        """Step with gradients that are means over all response tokens of the step."""
        closed = partial(self.step_mean.close, self, batch_idx, optimizer_closure)
        super().optimizer_step(epoch, batch_idx, optimizer, closed)

    def configure_gradient_clipping(
        self, optimizer: Optimizer, gradient_clip_val: Any = None, gradient_clip_algorithm: str | None = None
    ) -> None:
        """Clip, by the norm over all shards under FSDP too."""
        clip_gradients(self, optimizer, gradient_clip_val, gradient_clip_algorithm)

    def on_fit_start(self) -> None:
        """Get ready for what is restored next."""
        self.resume.prepare()

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Add the epoch's means so far, each rank's random numbers, and which teacher a cache stands for."""
        self.step_mean.check(self)
        self.resume.save(checkpoint)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Take up the epoch's means, unless the checkpoint is of others; random numbers wait until training starts."""
        self.resume.check(checkpoint)
        if (trainer := trainer_of(self)) is not None and trainer.state.fn == "fit":
            self.resume.load(checkpoint)

    def on_train_start(self) -> None:
        """Go on where the run that is resumed was."""
        self.resume.start()
        self.rollouts.start()

    @classmethod
    def load_from_checkpoint(cls, checkpoint_path: Any, weights_only: bool | None = True, **kwargs: Any) -> Any:  # type: ignore[override]
        """As Lightning's, but what a checkpoint holds is not run unless ``weights_only=False`` is given."""
        if isinstance(checkpoint_path, str | Path):
            AtomicCheckpointIO().load_checkpoint(checkpoint_path, weights_only=weights_only)
        return super().load_from_checkpoint(checkpoint_path, weights_only=weights_only, **kwargs)
