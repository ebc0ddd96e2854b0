"""The learning rate of an optimizer that is given none: it depends on what is trained."""

import inspect
from collections.abc import Mapping
from functools import partial
from pkgutil import resolve_name
from typing import TYPE_CHECKING, Any, NamedTuple

from torch import nn
from torch.optim import Adam, Optimizer

if TYPE_CHECKING:
    from akl_lightning.module import DistillationModule


class DefaultRate(NamedTuple):
    """A learning rate of Adam and its kin, and what it is for."""

    rate: float
    of: str


NEW = DefaultRate(2e-3, "new weights")
TRAINED = DefaultRate(5e-4, "a student that is trained already")
ADAPTER = DefaultRate(2e-3, "an adapter")


def default_rate(source: object, model: nn.Module) -> DefaultRate | None:
    """The rate for a student; None for a module that does not say whether its weights are new.

    Args:
        source: as :class:`~akl_lightning.module.DistillationModule` takes it.
        model: what was made of it, with the adapter that it may have.

    >>> default_rate({"model_type": "gpt2"}, nn.Identity())
    DefaultRate(rate=0.002, of='new weights')
    """
    if hasattr(model, "peft_config"):
        return ADAPTER
    if isinstance(source, Mapping) and "model_type" in source:
        return NEW
    return TRAINED if not isinstance(source, nn.Module) or getattr(source, "name_or_path", "") else None


def chosen_rate(module: "DistillationModule") -> DefaultRate | None:
    """The rate that a module's optimizer gets, or None where one is given, or the optimizer is no kind of Adam."""
    kind = class_without_rate(module.optimizer)
    model: Any = module.student.model
    # What was given by name is among the hyperparameters; a module is not.
    return default_rate(module.hparams.get("student", model), model) if kind and issubclass(kind, Adam) else None


def class_without_rate(make: Any) -> type[Optimizer] | None:
    """The class of optimizers that a callable makes, if it names no learning rate.

    What a function does nobody knows: the rate is its business.

    >>> class_without_rate(partial(Adam, eps=1e-6)), class_without_rate(partial(Adam, lr=1e-3))
    (<class 'torch.optim.adam.Adam'>, None)
    """
    parts = [make.func, *make.args] if isinstance(make, partial) else [make]  # jsonargparse has the class among them
    if isinstance(make, partial) and "lr" in make.keywords:
        return None
    return next((part for part in parts if isinstance(part, type) and issubclass(part, Optimizer)), None)


def leave_out_default(optimizer: Any) -> None:
    """Take the learning rate out of a parsed optimizer where nobody has given it.

    Args:
        optimizer: its ``class_path`` and ``init_args``, as jsonargparse has them; anything else stays as it is.
    """
    arguments = getattr(optimizer, "init_args", None)
    if arguments is None or "lr" not in arguments:
        return
    kind = resolve_name(optimizer.class_path)
    signatures = [inspect.signature(of).parameters for of in kind.__mro__ if issubclass(of, Optimizer)]
    # What nobody has given is the very object that stands in a signature: whatever is given is read anew.
    if any("lr" in signature and signature["lr"].default is arguments["lr"] for signature in signatures):
        del arguments["lr"]
