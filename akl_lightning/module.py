"""The LightningModule that users run or subclass."""

from collections.abc import Callable
from typing import Any, Literal, Self

import torch
from jsonargparse import lazy_instance
from lightning.pytorch import LightningModule
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable, ReduceLROnPlateau
from lightning.pytorch.core.optimizer import LightningOptimizer
from torch import Tensor, nn
from torch.optim import Optimizer
from torchmetrics import MetricCollection
from transformers import get_scheduler

from akl_lightning.criterion import CriterionOutput, DistillationCriterion
from akl_lightning.errors import UsageError
from akl_lightning.metrics import distillation_metrics
from akl_lightning.models import Batch, SplitModel, check_same_vocabulary, load_causal_lm, tokenizer_of
from akl_lightning.teachers.live import LiveTeacher

ScheduleName = Literal["constant", "constant_with_warmup", "linear", "cosine"]


class DistillationModule(LightningModule):
    """Distil a frozen teacher into a student.

    The loss returned by :meth:`training_step` is a *sum* over the response tokens of the micro-batch. Once per
    optimizer step the gradients are divided by the number of response tokens of the whole step, over micro-batches
    and ranks, before any callback, hook or clipping sees them: the same samples give the same update however they are
    split. A subclass that adds a loss of its own adds a sum over tokens too.

    Logged: ``{train,val,test}/{loss,divergence,cross_entropy,fkl,rkl,head_error,tail_error,head_weight,
    top1_agreement}`` once an epoch, as means over all response tokens, and ``train/loss_step`` every step.

    Args:
        student: what is trained: a hub name, a local folder, a ``transformers`` config mapping (new weights), or a
            module. A module that is no ``transformers`` model is called with the batch and gives logits
            ``[batch, length, vocab]``.
        teacher: what it learns from, given in the same ways; None only with ``criterion.alpha = 0``.
        criterion: what a batch costs.
        optimizer: called with the trainable parameters.
        lr_scheduler: the name of a schedule of ``transformers`` that spans the whole run and is stepped with every
            optimizer step, or a callable that takes the optimizer and is stepped once an epoch.
        warmup_steps: optimizer steps of linear warm-up, for a schedule given by name.
        max_new_tokens: length of the answers that :meth:`predict_step` generates.

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
    ) -> None:
        super().__init__()
        # Only plain data goes into a checkpoint. Under the command line that is the config; from a script, modules
        # and callables are left out and have to be given again to load_from_checkpoint.
        plain = {"student": student, "teacher": teacher}
        plain = {name: value for name, value in plain.items() if isinstance(value, str | dict | None)}
        self.save_hyperparameters(*plain, "warmup_steps", "max_new_tokens", logger=False)
        if teacher is None and criterion.needs_teacher:
            raise UsageError(f"criterion.alpha = {criterion.alpha} needs a teacher: give one, or set alpha to 0.")
        self._tokenizers = {"teacher": tokenizer_of(teacher), "student": tokenizer_of(student)}
        if self._tokenizers["teacher"] and self._tokenizers["student"]:
            check_same_vocabulary(self._tokenizers["teacher"], self._tokenizers["student"])
        self.student = SplitModel(load_causal_lm(student))
        self.teacher = None if teacher is None else LiveTeacher(load_causal_lm(teacher))
        self.criterion = criterion
        self.optimizer = optimizer
        self.lr_scheduler = lr_scheduler
        self.warmup_steps = warmup_steps
        self.max_new_tokens = max_new_tokens
        for stage in ("train", "val", "test"):
            self.add_module(f"{stage}_metrics", distillation_metrics(f"{stage}/", with_teacher=teacher is not None))
        self._window: list[tuple[int, Tensor, int]] = []

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        # The teacher is no submodule, yet it has to be where the student is.
        super()._apply(fn, recurse)
        if self.teacher is not None and (parameter := next(self.student.parameters(), None)) is not None:
            self.teacher.to(parameter.device)
        return self

    # ----------------------------------------------------------------------------------------------------------------
    # Checks before any work

    def setup(self, stage: str) -> None:
        """Check that student, teacher and data fit together."""
        models = {"student": self.student}
        if self.teacher is not None:
            models["teacher"] = self.teacher.model
        data = getattr(self.trainer, "datamodule", None)
        tokenizer = getattr(data, "tokenizer", None)
        sizes = {name: model.vocab_size for name, model in models.items() if model.vocab_size}
        for name, model in models.items():
            if tokenizer is not None and (own := self._tokenizers[name]) is not None:
                check_same_vocabulary(own, tokenizer, (name, "data"))
            model.check_fits(name, tokenizer, getattr(data, "max_length", None))
        if stage == "predict" and (limit := self.student.max_positions):
            longest = getattr(data, "max_prompt_length", 0) + self.max_new_tokens
            if longest > limit:
                raise UsageError(
                    f"data.max_prompt_length + model.max_new_tokens = {longest} is beyond the {limit} positions of the "
                    "student: lower one of them."
                )
        known = any(self._tokenizers.values()) or tokenizer is not None
        if len(set(sizes.values())) > 1 and not known:
            raise UsageError(
                f"student and teacher have {sizes['student']} and {sizes['teacher']} outputs and no tokenizer tells "
                f"whether token {min(sizes.values())} is padding: give models of one vocabulary, or a data module "
                "with their tokenizer."
            )

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
        positions, labels = self.criterion.response_labels(batch["labels"])
        teacher = None if self.teacher is None else self.teacher(batch, positions)
        return self.student(batch, positions, lambda student: self.criterion(student, teacher, labels))

    def training_step(self, batch: Batch, batch_idx: int) -> dict[str, Any]:
        """Loss (a sum over response tokens) and per-token statistics, which callbacks find in ``outputs``."""
        output = self.distill(batch)
        self.train_metrics.update(**output.statistics)
        self._window.append((batch_idx, output.loss.detach(), output.statistics["loss"].numel()))
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
        generate = getattr(self.student.model, "generate", None)
        if generate is None:
            raise UsageError(
                f"{type(self.student.model).__name__} has no generate method: override predict_step to predict with it."
            )
        prompts = {key: batch[key] for key in ("input_ids", "attention_mask")}
        answers = generate(**prompts, max_new_tokens=self.max_new_tokens, do_sample=False)
        return answers[:, batch["input_ids"].shape[1] :]

    def on_train_epoch_end(self) -> None:
        """Log the epoch's training means."""
        self._log_means(self.train_metrics)

    def on_validation_epoch_end(self) -> None:
        """Log the validation means."""
        self._log_means(self.val_metrics)

    def on_test_epoch_end(self) -> None:
        """Log the test means."""
        self._log_means(self.test_metrics)

    def _log_means(self, metrics: MetricCollection) -> None:
        self.log_dict({name: mean.float() for name, mean in metrics.compute().items()})
        metrics.reset()

    # ----------------------------------------------------------------------------------------------------------------
    # Optimization

    def configure_optimizers(self) -> Any:
        """The optimizer over all trainable parameters, and its schedule."""
        optimizer = self.optimizer([parameter for parameter in self.parameters() if parameter.requires_grad])
        if isinstance(self.lr_scheduler, str):
            steps = int(self.trainer.estimated_stepping_batches)
            scheduler = get_scheduler(self.lr_scheduler, optimizer, self.warmup_steps, steps)
            return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}
        scheduler = self.lr_scheduler(optimizer)
        config: dict[str, Any] = {"scheduler": scheduler}
        if isinstance(scheduler, ReduceLROnPlateau):
            config["monitor"] = scheduler.monitor
        return {"optimizer": optimizer, "lr_scheduler": config}

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
        losses = torch.stack([loss.double() for _, loss, _ in window])
        mine = torch.stack([losses.sum(), losses.new_tensor(sum(tokens for *_, tokens in window))])
        loss, tokens = self.trainer.strategy.reduce(mine, reduce_op="sum")
        if loss.isnan():  # on every rank alike, so that none waits for another that has stopped
            where = [str(batch_idx) for batch_idx, loss, _ in window if loss.isnan()]
            raise UsageError(
                f"the loss is NaN at optimizer step {self.trainer.global_step}, epoch {self.current_epoch}, batch "
                f"{', '.join(where) or 'of another rank'}: look at that batch, lower the learning rate, or clip."
            )
        # Lightning has divided each loss by the micro-batches of a step, and DDP and FSDP the sum by the ranks.
        factor = self.trainer.accumulate_grad_batches * self.trainer.world_size / tokens.clamp(min=1)
        gradients = [parameter.grad for parameter in self.parameters() if parameter.grad is not None]
        if gradients:
            torch._foreach_mul_(gradients, factor.to(gradients[0].dtype))
        self.log("train/loss_step", (loss / tokens.clamp(min=1)).float(), prog_bar=True, on_step=True, on_epoch=False)
