"""Do student, teacher, data and Trainer fit together? Asked before any work."""

from typing import TYPE_CHECKING

from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import LearningRateFinder
from lightning.pytorch.strategies import FSDPStrategy, ModelParallelStrategy

from akl_lightning.data.facts import data_of, facts_of_run
from akl_lightning.data.module import InstructionDataModule
from akl_lightning.errors import UsageError
from akl_lightning.models.split import SplitModel
from akl_lightning.models.vocabulary import check_same_vocabulary
from akl_lightning.parallel import check_no_averages
from akl_lightning.teachers.base import Teacher

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


def check_run(module: "DistillationModule", stage: str) -> None:
    """Raise :class:`UsageError` unless student, teacher, data and Trainer fit together.

    Args:
        module: attached to its Trainer.
        stage: ``fit``, ``validate``, ``test`` or ``predict``.
    """
    trainer, data, facts = module.trainer, data_of(module.trainer), facts_of_run(module.trainer)
    if trainer.strategy.root_device.type == "mps":
        raise UsageError("MPS has no float64, in which sums over tokens are kept: give trainer.accelerator cpu.")
    if stage == "fit" and not any(parameter.requires_grad for parameter in module.parameters()):
        raise UsageError(
            f"there is nothing to train: no parameter of the student, {module.student.description}, requires a "
            "gradient; give model.lora, or unfreeze what is to be trained (requires_grad_)."
        )
    models: dict[str, SplitModel | Teacher] = {"student": module.student}
    if module.teacher is not None:
        models["teacher"] = module.teacher
    for name, model in models.items():
        if facts.tokenizer is not None and (own := module.model_tokenizers[name]) is not None:
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
    if module.teacher is not None:
        module.teacher.check_run(stage, trainer, module.criterion)
