"""Every private attribute of another library that the package relies on, one small function each.

A release of that library may take it away or change what it means, without a word. So nothing else in the package
touches one, each function says why there is no public way, and a test of each fails with a sentence when it is gone.
"""

from __future__ import annotations

import sys
from argparse import ArgumentParser
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor, nn

if TYPE_CHECKING:  # what needs one small function of this file is not to import them all
    import jinja2
    from lightning.pytorch import LightningModule, Trainer
    from lightning.pytorch.strategies import ModelParallelStrategy
    from transformers import PreTrainedConfig, PreTrainedModel

Model = TypeVar("Model", bound="PreTrainedModel")
Class = TypeVar("Class", bound=type)


# --------------------------------------------------------------------------------------------------------------------
# torch


def has_forward_hooks(module: nn.Module) -> bool:
    """Whether something hangs on a module's forward, so that its weight alone is not what it does."""
    return bool(module._forward_hooks or module._forward_pre_hooks)


def multiply_all(tensors: list[Tensor], factor: Tensor) -> None:
    """Multiply tensors of one dtype by a scalar of it, in place: one kernel for all of them on a GPU."""
    torch._foreach_mul_(tensors, factor)


def compile_errors() -> type[Exception]:
    """What ``torch.compile`` raises where it cannot compile."""
    from torch._dynamo.exc import TorchDynamoException  # half a second, which only a failure is worth

    return TorchDynamoException


# --------------------------------------------------------------------------------------------------------------------
# transformers


def new_model(kind: type[Model], config: PreTrainedConfig, dtype: torch.dtype) -> Model:
    """A model with new weights in a dtype, while what it keeps in float32 (rotary frequencies) stays so.

    ``AutoModelForCausalLM.from_config`` does it too, but finds the class by itself, and not one of the user's own.
    """
    return kind._from_config(config, dtype=dtype)


def is_recurrent(model: nn.Module | None) -> bool:
    """Whether a model carries a state from token to token, which knows no mask."""
    return getattr(model, "_is_stateful", False)


def attention_of(model: PreTrainedModel) -> str:
    """The attention that a model runs with; ``set_attn_implementation`` is public, and nothing to ask what it set."""
    return str(model.config._attn_implementation)


def take_batching_manager(model: PreTrainedModel) -> Any:
    """What continuous batching has kept on a model, taken off it, or None.

    It holds locks, and a model with it cannot be copied; what is public ends it, or leaves it there.
    """
    return model.__dict__.pop("_cached_continuous_batching_manager", None)


def put_batching_manager(model: PreTrainedModel, manager: Any) -> None:
    """Put it back, for the next session to go on with."""
    if manager is not None:
        model._cached_continuous_batching_manager = manager


def compiled_chat_template(text: str) -> jinja2.Template:
    """A chat template as ``apply_chat_template`` compiles it, which copies every message before it renders one."""
    from transformers.utils.chat_template_utils import _compile_jinja_template

    return _compile_jinja_template(text)


def mark_as_read(tensors: Iterable[Tensor]) -> None:
    """Let ``initialize_weights`` leave tensors alone that hold what a file has given."""
    for tensor in tensors:
        tensor._is_hf_initialized = True  # type: ignore[attr-defined]


# --------------------------------------------------------------------------------------------------------------------
# PEFT


@contextmanager
def without_adapters(model: nn.Module) -> Iterator[None]:
    """Let the layers of a model that have adapters do without them.

    PEFT's own ``disable_adapter`` turns the gradients of the adapters' parameters off and on as well, which those who
    have sharded them, or synchronise them, may not like to see within a step.
    """
    layers = [module for module in model.modules() if getattr(module, "_disable_adapters", True) is False]
    for layer in layers:
        layer._disable_adapters = True  # type: ignore[assignment]
    try:
        yield
    finally:
        for layer in layers:
            layer._disable_adapters = False  # type: ignore[assignment]


# --------------------------------------------------------------------------------------------------------------------
# Lightning


def trainer_of(module: LightningModule) -> Trainer | None:
    """The Trainer, or None without one, where the public property raises or gives Fabric's."""
    return module._trainer


def replicate_data_over_all(strategy: ModelParallelStrategy) -> None:
    """Let every device have samples of its own, before the strategy builds its mesh from that number."""
    strategy._data_parallel_size = strategy.num_nodes * strategy.num_processes


def forget_loaded_data(trainer: Trainer) -> None:
    """Make the Trainer load its data anew, so that it restores where they were.

    Whoever has asked for ``trainer.estimated_stepping_batches`` has made it load them, and then it restores nothing.
    """
    trainer.fit_loop._combined_loader = None


def evaluated_loaders(trainer: Trainer) -> Any:
    """What a validation or test that is under way has for its loaders: one, a list, or a mapping.

    ``trainer.val_dataloaders`` are those of the last fit, even in a validation of its own behind it.
    """
    loader = trainer._evaluation_loop._combined_loader
    return None if loader is None else loader.iterables


def log_step_now(trainer: Trainer) -> None:
    """Give the loggers the metrics of the step that has just ended, before Lightning does."""
    trainer._logger_connector.update_train_step_metrics()


def counts_epochs_without_end(bar: Class) -> Class:
    """Decorate a ``RichProgressBar``: where steps alone end a run, it says ``Epoch 0``, and not ``Epoch 0/-2``."""
    describe = bar._get_train_description  # type: ignore[attr-defined]

    def described(self: Any, current_epoch: int) -> str:
        description = describe(self, current_epoch)
        return description.replace("/-2", "").ljust(len(description))  # of one width, so that nothing flickers

    bar._get_train_description = described  # type: ignore[attr-defined]
    return bar


# --------------------------------------------------------------------------------------------------------------------
# torchmetrics


def import_torchmetrics() -> None:
    """Import it without ``scipy.signal``, half a second, in which it looks for a name that a package for speech wants.

    Whoever imports SciPy's signals later gets them.
    """
    if "torchmetrics" in sys.modules or "scipy.signal" in sys.modules:
        return
    stand_in = ModuleType("scipy.signal")
    stand_in.hamming = None  # type: ignore[attr-defined]
    sys.modules["scipy.signal"] = stand_in
    try:
        import torchmetrics  # noqa: F401
    finally:
        del sys.modules["scipy.signal"]


# --------------------------------------------------------------------------------------------------------------------
# argparse and jsonargparse


def options_of(parser: ArgumentParser) -> list[str]:
    """Every option that a parser takes, as it is typed."""
    return list(parser._option_string_actions)


def actions_of(parser: ArgumentParser) -> list[Any]:
    """The arguments of a parser, each with its ``dest``."""
    return parser._actions


def subcommands_of(parser: Any) -> Any:
    """Where a jsonargparse parser has its subcommands; the public ``add_subcommands`` can be called once alone."""
    return parser._subcommands_action


def is_stand_in(kind: type) -> bool:
    """Whether a class is what jsonargparse's ``lazy_instance`` makes of another, so that a default is built late."""
    return kind.__name__.startswith("LazyInstance_")


def keeps_given_settings(cli: Class) -> Class:
    """Decorate a ``LightningCLI``: what a checkpoint remembers of its run's settings no longer beats the flags."""
    cli._parse_ckpt_path = lambda self: None  # type: ignore[attr-defined]
    return cli
