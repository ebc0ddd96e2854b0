"""What callbacks ask for before any work."""

from lightning.pytorch import Callback, LightningModule, Trainer

from akl_lightning.errors import UsageError
from akl_lightning.module import DistillationModule


def require_distillation(callback: Callback, module: LightningModule, instead: str) -> None:
    """Raise :class:`UsageError` unless the module is one of this package's."""
    if not isinstance(module, DistillationModule):
        raise UsageError(f"{type(callback).__name__} needs a DistillationModule: {instead}.")


def require_teacher(callback: Callback, module: LightningModule) -> None:
    """Raise :class:`UsageError` unless the module has a teacher."""
    if not isinstance(module, DistillationModule) or module.teacher is None:
        raise UsageError(f"{type(callback).__name__} needs a DistillationModule with a teacher: remove the callback.")


def require_logger(callback: Callback, trainer: Trainer) -> None:
    """Raise :class:`UsageError` unless the Trainer has a logger."""
    if not trainer.loggers:
        raise UsageError(f"{type(callback).__name__} needs a logger: give the Trainer one or remove the callback.")


def require_tokenizer(callback: Callback, module: LightningModule) -> None:
    """Raise :class:`UsageError` unless something can turn tokens into words."""
    if not isinstance(module, DistillationModule) or module.find_tokenizer() is None:
        raise UsageError(
            f"{type(callback).__name__} needs a tokenizer to write words: give the Trainer a data module that has one "
            "as its tokenizer, or remove the callback."
        )
