"""Do student, teacher, data and Trainer fit together? Asked before any work."""

import warnings
from typing import TYPE_CHECKING

import torch
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import LearningRateFinder
from lightning.pytorch.strategies import FSDPStrategy, ModelParallelStrategy
from lightning.pytorch.utilities import rank_zero_warn

from akl_lightning.batch import Batch, expect_transfer_hook
from akl_lightning.data.collate import IGNORE_INDEX
from akl_lightning.data.facts import data_of, facts_of_run
from akl_lightning.data.module import InstructionDataModule
from akl_lightning.errors import UsageError
from akl_lightning.models.split import SplitModel
from akl_lightning.models.vocabulary import check_same_vocabulary
from akl_lightning.parallel import check_no_averages
from akl_lightning.rollouts.checks import check_rollouts
from akl_lightning.teachers.aligned import AlignedTeacher
from akl_lightning.teachers.base import Teacher
from akl_lightning.teachers.live import LiveTeacher

if TYPE_CHECKING:
    from akl_lightning.module import DistillationModule


def check_callbacks(trainer: Trainer) -> None:
    """Raise :class:`UsageError` for a callback that cannot work with the strategy or the data."""
    if isinstance(trainer.strategy, ModelParallelStrategy | FSDPStrategy):
        check_no_averages(trainer)
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        if isinstance(callback, LearningRateFinder) and facts_of_run(trainer).group_by_length:
            raise UsageError(
                f"{type(callback).__name__} compares the summed losses of batches, which samples grouped by length set "
                "far apart: set data.group_by_length to false while it searches."
            )


def leave_out_what_does_not_apply(trainer: Trainer) -> None:
    """Keep warnings of Lightning from the user that do not hold here."""
    if trainer.world_size > 1:  # torchmetrics has averaged over ranks what Lightning would like to
        warnings.filterwarnings("ignore", message=r".*self\.log\('(train|val|test)/.*sync_dist=True")
    expect_transfer_hook()


def check_run(module: "DistillationModule", stage: str) -> None:
    """Raise :class:`UsageError` unless student, teacher, data and Trainer fit together.

    Args:
        module: attached to its Trainer.
        stage: ``fit``, ``validate``, ``test`` or ``predict``.
    """
    trainer, data, facts = module.trainer, data_of(module.trainer), facts_of_run(module.trainer)
    if trainer.strategy.root_device.type == "mps":
        raise UsageError("MPS has no float64, in which sums over tokens are kept: give trainer.accelerator cpu.")
    if isinstance(data, InstructionDataModule) and module.criterion.ignore_index != IGNORE_INDEX:
        raise UsageError(
            f"criterion.ignore_index = {module.criterion.ignore_index} and {type(data).__name__} labels with "
            f"{IGNORE_INDEX} what is not to be learnt: leave it at {IGNORE_INDEX}."
        )
    if stage == "fit" and not any(parameter.requires_grad for parameter in module.parameters()):
        raise UsageError(
            f"there is nothing to train: no parameter of the student, {module.student.description}, requires a "
            "gradient; give model.lora, or unfreeze what is to be trained (requires_grad_)."
        )
    models: dict[str, SplitModel | Teacher] = {"student": module.student}
    if module.teacher is not None:
        models["teacher"] = module.teacher
    for name, model in models.items():
        own = None if isinstance(model, AlignedTeacher) else module.model_tokenizers[name]
        if facts.tokenizer is not None and own is not None:
            check_same_vocabulary(own, facts.tokenizer, (name, "data"))
        model.check_fits(name, facts.tokenizer, facts.max_length)
    if stage == "predict" and isinstance(data, InstructionDataModule):
        positions = module.student.max_positions
        data.check_answers_fit(data.predict_split, "model.max_new_tokens", module.max_new_tokens, positions)
    sizes = {name: model.vocab_size for name, model in models.items() if model.vocab_size}
    if len(set(sizes.values())) > 1 and not any(module.model_tokenizers.values()) and facts.tokenizer is None:
        raise UsageError(
            f"student and teacher have {sizes['student']} and {sizes['teacher']} outputs and no tokenizer tells "
            f"whether token {min(sizes.values())} is padding: give models of one vocabulary, or a data module "
            "with their tokenizer."
        )
    extra = sizes.get("student", 0) - sizes.get("teacher", sizes.get("student", 0))
    if extra > 0 and module.criterion.alpha == 1 and stage == "fit":
        rank_zero_warn(
            f"the student has {extra} outputs that the teacher lacks, and with criterion.alpha = 1 no cross entropy "
            "keeps it off them: minus the log of its mass on the others is added to the loss."
        )
    if module.teacher is not None:
        module.teacher.check_run(stage, trainer, module.criterion)
    check_rollouts(module, stage)


def check_batch(module: "DistillationModule", batch: Batch) -> None:
    """Raise :class:`UsageError` for a batch on which a model would fail somewhere inside, or a GPU without a reason.

    Args:
        module: has the models.
        batch: ``input_ids``, ``attention_mask`` and ``labels``; what is on a GPU is not read, which would wait for it.
    """
    ids, mask, labels = (batch[key] for key in ("input_ids", "attention_mask", "labels"))
    shapes = [tuple(tensor.shape) for tensor in (ids, mask, labels)]
    odd = len(shapes[0]) != 2 or shapes[2] != shapes[0] or (mask.dim() == 2 and shapes[1] != shapes[0])
    if odd or any(tensor.is_floating_point() for tensor in (ids, labels)):
        raise UsageError(
            f"the batch's input_ids, attention_mask and labels are {shapes[0]}, {shapes[1]} and {shapes[2]}, of "
            f"{ids.dtype} and {labels.dtype}: let them be integers of one shape, [batch, length]."
        )
    if ids.is_cuda or not ids.numel():
        return
    models = {"student": module.student}
    if isinstance(module.teacher, LiveTeacher):
        models["teacher"] = module.teacher.model
    first, last = (int(number) for number in torch.aminmax(ids))
    longest = int(mask.sum(1).max())
    for name, model in models.items():
        embeddings = getattr(model.model, "get_input_embeddings", lambda: None)()
        known = getattr(embeddings, "num_embeddings", None)
        if known and not 0 <= first <= last < known:
            raise UsageError(
                f"the batch holds the token {first if first < 0 else last}, and the {name} knows those from 0 to "
                f"{known - 1}: let the DataLoader give tokens of its vocabulary."
            )
        if model.max_positions and longest > model.max_positions:
            raise UsageError(
                f"a sample of {longest} tokens is beyond the {model.max_positions} positions of the {name}: cut it."
            )
    learnt = labels[labels != module.criterion.ignore_index]
    outputs = module.student.vocab_size
    if outputs and learnt.numel() and not 0 <= int(learnt.min()) <= int(learnt.max()) < outputs:
        odd = int(learnt.min()) if int(learnt.min()) < 0 else int(learnt.max())
        raise UsageError(
            f"the batch holds the label {odd}, and the student has outputs from 0 to {outputs - 1}: let labels be "
            f"tokens, or {module.criterion.ignore_index} where nothing is to be learnt."
        )
