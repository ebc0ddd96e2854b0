"""Can rollouts be had of this student, teacher, data and Trainer? Asked before any work."""

import inspect
from typing import TYPE_CHECKING

from lightning.pytorch.strategies import FSDPStrategy, ModelParallelStrategy
from lightning.pytorch.utilities import rank_zero_warn

from akl_lightning.data.collate import column
from akl_lightning.data.facts import data_of
from akl_lightning.data.module import InstructionDataModule
from akl_lightning.errors import UsageError
from akl_lightning.rollouts.draw import Rollouts
from akl_lightning.rollouts.settings import CACHED_TEACHER
from akl_lightning.teachers.aligned import inner_of
from akl_lightning.teachers.cache.reader import CachedTeacher
from akl_lightning.teachers.live import LiveTeacher

if TYPE_CHECKING:
    from akl_lightning.module import DistillationModule


def check_rollouts(module: "DistillationModule", stage: str) -> None:
    """Raise :class:`UsageError` unless the module can learn on-policy.

    Args:
        module: attached to its Trainer, with rollouts.
        stage: ``fit``, ``validate``, ``test`` or ``predict``.
    """
    rollouts, teacher, model = module.rollouts, module.teacher, module.student.model
    if not isinstance(rollouts, Rollouts) or stage not in ("fit", "validate"):
        return
    off = "set on_policy.share to 0"
    if teacher is None:
        raise UsageError(f"rollouts are scored by a teacher and there is none: give model.teacher, or {off}.")
    if isinstance(inner_of(teacher), CachedTeacher):
        raise UsageError(CACHED_TEACHER)
    if getattr(module.student.config, "is_encoder_decoder", False):
        raise UsageError(
            f"{module.student.description} is an encoder-decoder, whose answers do not go on from their prompts: take "
            f"a causal language model, or {off}."
        )
    if rollouts.settings.engine is None and not hasattr(model, "generate"):
        raise UsageError(
            f"{type(model).__name__} has no generate method and cannot answer: give it one that is called as "
            f"transformers' is (input_ids, attention_mask, max_new_tokens, logits_processor, …), or {off}."
        )
    if not rollouts.sampler.ends:
        raise UsageError(
            "nothing says which token ends a response: give the Trainer a data module whose tokenizer has an "
            "end-of-text token (eos_token), or the student a generation_config.eos_token_id."
        )
    if "alpha" not in inspect.signature(module.compare).parameters:
        raise UsageError(
            f"{type(module).__name__}.compare takes no alpha, the weight of the divergence at each token, which is 1 "
            f"at those of rollouts: add the argument, or {off}."
        )
    if isinstance(module.trainer.strategy, FSDPStrategy):
        raise UsageError(f"rollouts do not gather the weights of the strategy fsdp: take fsdp2 or ddp, or {off}.")
    if rollouts.settings.responses_from != "student":
        _check_teacher_answers(rollouts)
    data = data_of(module.trainer)
    if not isinstance(data, InstructionDataModule):
        return
    if data.chat.learn == "everything":
        raise UsageError(f"data.learn everything leaves no prompt to be answered: set it to all_turns, or {off}.")
    if stage == "fit" and "text" in data.splits["train"].unique("form"):
        raise UsageError(
            f"the training data hold documents, which have no prompt to be answered: leave them out, or {off}."
        )
    if stage == "fit" and not max(data.splits["train"]["prompt_length"], default=0):
        raise UsageError(f"no training sample has a prompt to be answered: give other data, or {off}.")
    setting, tokens = "on_policy.decoding.max_new_tokens", rollouts.settings.decoding.max_new_tokens
    positions = None if (room := rollouts.sampler.room) is None else room + tokens
    splits = ["train"] * (stage == "fit") + ["validation"] * (rollouts.settings.validation_samples > 0)
    for split in splits:
        data.check_answers_fit(split, setting, tokens, positions)
    if stage == "fit":
        _warn_of_monitors(rollouts, data)


def _warn_of_monitors(rollouts: Rollouts, data: InstructionDataModule) -> None:
    """Say which callbacks wait for a value that does not come."""
    learnt = column(data.splits["validation"], "learnt")
    if not len(learnt) or learnt.any():
        return
    own = "" if rollouts.settings.validation_samples else ", with on_policy.validation_samples above 0"
    for callback in rollouts.module.trainer.callbacks:  # type: ignore[attr-defined]
        monitor = getattr(callback, "monitor", None) or ""
        if monitor.startswith("val/") and monitor != "val/rollout_rkl":
            rank_zero_warn(
                f"{type(callback).__name__} watches {monitor}, which has no value where the validation samples are "
                f"prompts alone: let it watch val/rollout_rkl{own}."
            )


def _check_teacher_answers(rollouts: Rollouts) -> None:
    wish, teacher = f"on_policy.responses_from {rollouts.settings.responses_from}", rollouts.module.teacher
    if not isinstance(teacher, LiveTeacher) or not hasattr(teacher.model.model, "generate"):
        raise UsageError(f"{wish} needs a teacher that is a model and can generate: set it to student.")
    if isinstance(rollouts.module.trainer.strategy, ModelParallelStrategy):
        raise UsageError(
            f"{wish} needs the whole teacher on each device, and it is sharded: take the strategy ddp, or write its "
            "answers with akl generate first."
        )
