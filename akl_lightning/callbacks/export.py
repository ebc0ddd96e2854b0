"""The student as a folder that other tools take."""

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import transformers
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback, ModelCheckpoint, StochasticWeightAveraging, WeightAveraging
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from torch import Tensor
from transformers import PreTrainedTokenizerBase
from transformers.utils import logging

from akl_lightning.callbacks.model_card import model_card
from akl_lightning.checkpoint import atomic_folder, check_writable, claim_folder
from akl_lightning.compat import new_model
from akl_lightning.data.facts import facts_of_run
from akl_lightning.errors import UsageError
from akl_lightning.models.generation import ending, stop_tokens
from akl_lightning.models.load import load_tokenizer
from akl_lightning.models.lora import virtual_tokens
from akl_lightning.models.vocabulary import tokenizer_of
from akl_lightning.module import DistillationModule
from akl_lightning.parallel import ending_together

_PREFIX = "student.model."


class StudentExport(Callback):
    """Write the student when training ends, as it is then and as it was at the best checkpoint.

    Each is a folder as ``save_pretrained`` writes it: weights in safetensors, config, generation config, the data's
    tokenizer with the template that the user has given and the template's arguments, and a model card. The best is that
    of the first ``ModelCheckpoint`` with a ``monitor``; without one there is no such folder.

    Args:
        dirpath: the folder; the best student goes to the one beside it whose name ends in ``-best``. Where it is not
            given, ``student`` in the Trainer's ``default_root_dir``. Nothing is ever overwritten: a folder that is
            given and not empty is refused, and a run that is resumed, or that names none, goes on to ``student-v1``.
        merge: write a student that PEFT has wrapped as one model, its adapter merged in; False for the adapter alone,
            which is loaded onto the model that it was made for.
        tokenizer: the one to write beside the student, or the hub name or local folder of one; the data's, or else the
            one that lies beside student or teacher, where it is not given.

    Raises:
        UsageError: the student is no ``transformers`` model, or its adapter cannot be written so; the folder is another
            run's or cannot be written to.
    """

    def __init__(
        self,
        dirpath: str | None = None,
        merge: bool = True,
        tokenizer: PreTrainedTokenizerBase | str | None = None,
    ) -> None:
        self.dirpath = dirpath
        self.merge = merge
        self.tokenizer = _named(tokenizer) if isinstance(tokenizer, str) else tokenizer
        self.exported: Path | None = None
        """Where the last student lies, once it is written."""
        self.exported_best: Path | None = None
        """Where the best one lies, if there is one."""
        self.validations: dict[int, dict[str, float]] = {}
        """What was measured, by optimizer steps done."""

    def _folder(self, root: str | Path, suffix: str = "") -> Path:
        folder = Path(self.dirpath or Path(root) / "student")
        return folder.with_name(folder.name + suffix)

    def look(self, root: Path, goes_on: bool) -> None:
        """Look at the folders before any work.

        Args:
            root: the Trainer's ``default_root_dir``.
            goes_on: whether the run goes on from a checkpoint.

        Raises:
            UsageError: they are another run's, or cannot be written to.
        """
        for folder in (self._folder(root), self._folder(root, "-best")):
            own = folder in (self.exported, self.exported_best)
            if self.dirpath and not goes_on and folder.exists() and not own and not _is_empty(folder):
                raise UsageError(f"{folder} is not empty and is never overwritten: give StudentExport another dirpath.")
        check_writable(self._folder(root).parent)

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Check that the student can be exported."""
        if stage != "fit":
            return
        student: Any = getattr(getattr(pl_module, "student", None), "model", None)
        adapted = hasattr(student, "peft_config")
        if not adapted and not isinstance(student, transformers.PreTrainedModel):
            raise UsageError(
                f"StudentExport cannot write a {type(student).__name__}, only transformers models: remove the callback."
            )
        if adapted and self.merge and not hasattr(student.base_model, "merge_and_unload"):
            raise UsageError("StudentExport cannot merge this kind of adapter: give it merge=False.")
        if adapted and not self.merge and not student.get_base_model().name_or_path:
            raise UsageError(
                "StudentExport cannot write the adapter alone, the student has no folder to load it onto: save the "
                "student and give its folder, or let merge be true."
            )
        callbacks = trainer.callbacks  # type: ignore[attr-defined]
        for callback in callbacks[callbacks.index(self) :]:
            if isinstance(callback, StochasticWeightAveraging | WeightAveraging):
                raise UsageError(
                    f"StudentExport stands before {type(callback).__name__} and would write weights that are not "
                    "averaged yet: list it after."
                )
        check_writable(self._folder(trainer.default_root_dir).parent)
        assert isinstance(pl_module, DistillationModule)
        if self.tokenizer is not None:
            pl_module.student.check_fits("student", self.tokenizer, None)
        elif pl_module.find_tokenizer() is None:
            rank_zero_warn(
                "StudentExport finds no tokenizer, neither in the data module nor beside a model: the folder it writes "
                "will have none. Give StudentExport(tokenizer=...), a folder or a tokenizer."
            )

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Refuse a folder that is another run's."""
        # Not before: the Trainer knows its ckpt_path only now.
        self.look(Path(trainer.default_root_dir), goes_on=bool(trainer.ckpt_path))

    # Before the ModelCheckpoints, which are called last, so that they keep it.
    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Remember what the model card says of the checkpoint that may be written now."""
        if trainer.state.fn == "fit" and not trainer.sanity_checking:
            self.validations[trainer.global_step] = {
                name: value.item() for name, value in trainer.callback_metrics.items() if name.startswith("val/")
            }

    def on_train_end(self, trainer: Trainer, pl_module: DistillationModule) -> None:
        """Write the folders."""
        # On every rank: where the student is sharded, each has a part of it.
        weights = trainer.strategy.lightning_module_state_dict()
        with ending_together(trainer):
            if trainer.is_global_zero:
                self._write_both(trainer, pl_module, weights)

    def _write_both(self, trainer: Trainer, module: DistillationModule, weights: Any) -> None:
        epoch, step = trainer.current_epoch, trainer.global_step
        if lost := self._lost(trainer):
            rank_zero_warn(
                f"the student's tokenizer does not have the template's {' and '.join(lost)} that it has learnt with: "
                "whoever serves it has to give them to apply_chat_template."
            )
        self.exported = self._write(trainer, module, "", weights, f"the last of {epoch} epochs", step)
        rank_zero_info(f"student exported to {self.exported}")
        if best := _best_checkpoint(trainer):
            checkpoint = trainer.strategy.checkpoint_io.load_checkpoint(best)
            weights = {**weights, **checkpoint["state_dict"]}  # which may leave out what is frozen
            step = checkpoint["global_step"]
            self.exported_best = self._write(
                trainer, module, "-best", weights, f"the best of {epoch} epochs, {Path(best).name}", step
            )
            rank_zero_info(f"best student exported to {self.exported_best}")

    def _lost(self, trainer: Trainer) -> list[str]:
        """Names of the template's arguments that the tokenizer that is written does not have: it is given, as it is."""
        facts = facts_of_run(trainer)
        return [] if self.tokenizer in (None, facts.tokenizer) else list(facts.template_arguments or {})

    def _write(
        self, trainer: Trainer, module: DistillationModule, suffix: str, weights: Any, which: str, step: int
    ) -> Path:
        own: dict[str, Tensor] = {
            name.removeprefix(_PREFIX): weight for name, weight in weights.items() if name.startswith(_PREFIX)
        }
        path = self._folder(trainer.default_root_dir, suffix)
        if _is_empty(path):
            path.rmdir()
        path = claim_folder(path)
        facts, lost = facts_of_run(trainer), self._lost(trainer)
        model, tokenizer = module.student.model, self.tokenizer or module.find_tokenizer()
        if tokenizer is not None and tokenizer is facts.tokenizer and facts.chat_template is not None:
            tokenizer = copy.deepcopy(tokenizer)
            tokenizer.chat_template = facts.chat_template
        if hasattr(model, "peft_config") and (self.merge or virtual_tokens(model)):
            model = _rebuilt(model, own)  # PEFT writes the prompt of the model that it is given
            if self.merge:
                model = model.merge_and_unload()
            own = model.state_dict()
        with atomic_folder(path, claimed=True) as folder:
            with _without_progress_bar():
                model.save_pretrained(folder, state_dict=own)
            if tokenizer is not None:
                tokenizer.save_pretrained(folder)
            if model.can_generate():
                generation = copy.deepcopy(model.generation_config)
                ends = ending(stop_tokens(model, tokenizer, facts.end_tokens), tokenizer)
                if generation.pad_token_id is not None:
                    ends.pop("pad_token_id", None)
                generation.update(**ends)  # so that answers end where the module's do
                generation.save_pretrained(folder)
            which = f"{which}, after {step:,} optimizer steps"
            card = model_card(trainer, module, which, self.validations.get(step), lost)
            (folder / "README.md").write_text(card, encoding="utf-8")
        return path

    def state_dict(self) -> dict[str, Any]:
        """What was measured so far, so that a resumed run can tell of an earlier best."""
        return {"validations": self.validations}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on with what the run that is resumed has measured."""
        self.validations = dict(state_dict["validations"])


def _named(source: str) -> PreTrainedTokenizerBase:
    tokenizer = load_tokenizer(source)
    if tokenizer_of(source) is None:  # made out of nothing
        raise UsageError(f"cannot load the tokenizer {source!r}: there is a model without one; give another.")
    return tokenizer


@contextmanager
def _without_progress_bar() -> Iterator[None]:
    """Without the bar of ``transformers``, which would be drawn into the Trainer's."""
    enabled = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if enabled:
            logging.enable_progress_bar()


def _rebuilt(model: Any, weights: dict[str, Tensor]) -> Any:
    """A new adapted model with these weights; the one that is trained, perhaps sharded, stays as it is."""
    from peft import get_peft_model

    base = model.get_base_model()
    rebuilt = new_model(type(base), copy.deepcopy(base.config), base.dtype)
    rebuilt.name_or_path = base.name_or_path
    rebuilt.generation_config = copy.deepcopy(base.generation_config)
    (name, config), *others = copy.deepcopy(model.peft_config).items()
    rebuilt = get_peft_model(rebuilt, config, name)
    for other, config in others:
        rebuilt.add_adapter(other, config)
    rebuilt.load_state_dict(weights)
    rebuilt.set_adapter(model.active_adapter)
    return rebuilt


def _is_empty(folder: Path) -> bool:
    return folder.is_dir() and not any(folder.iterdir())


def _best_checkpoint(trainer: Trainer) -> str | None:
    for callback in trainer.checkpoint_callbacks:
        if isinstance(callback, ModelCheckpoint) and callback.monitor and Path(callback.best_model_path).is_file():
            return callback.best_model_path
    return None
