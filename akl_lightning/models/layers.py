"""The decoder layers of a model, and a student made of some of a teacher's."""

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from transformers import PreTrainedConfig

from akl_lightning.compat import new_model
from akl_lightning.errors import UsageError

PROBE_TOKENS = 16
"""Tokens on which it is tried whether a model does what is expected of it."""


def text_config(config: Any) -> Any:
    """What a ``transformers`` config says of the model of text in it: itself, but for models that see or hear, too."""
    return config.get_text_config(decoder=True) if isinstance(config, PreTrainedConfig) else config


def decoder_layers(model: nn.Module) -> tuple[str, nn.ModuleList]:
    """Name and list of a ``transformers`` model's layers; an empty list where they cannot be told.

    Of a model that sees, too, those of its text: its tower may have as many.
    """
    count = getattr(text_config(getattr(model, "config", None)), "num_hidden_layers", 0)
    get_decoder: Any = getattr(model, "get_decoder", None)
    of_text = set((model if get_decoder is None else get_decoder()).modules())
    for name, part in model.named_modules():
        if isinstance(part, nn.ModuleList) and count and len(part) == count and part in of_text:
            return name, part
    return "", nn.ModuleList()


def prune_layers(model: "transformers.PreTrainedModel", keep: Sequence[int]) -> "transformers.PreTrainedModel":
    """A new model made of some decoder layers of another, and of its embeddings, norms and head.

    The result is checked: on a few tokens its logits are those of the model with the other layers skipped.

    Args:
        model: a ``transformers`` decoder; it stays as it is.
        keep: which of its layers, by number, in ascending order: ``range(0, 30, 2)`` for every second one of 30.

    Raises:
        UsageError: no such layer, or a model whose layers cannot be told or do not come apart.

    >>> from transformers import GPT2Config, GPT2LMHeadModel
    >>> teacher = GPT2LMHeadModel(GPT2Config(vocab_size=50, n_layer=4, n_embd=8, n_head=2))
    >>> prune_layers(teacher, range(0, 4, 2)).config.n_layer
    2
    """
    count, keep = getattr(text_config(model.config), "num_hidden_layers", 0), list(keep)
    if not keep or sorted(set(keep)) != keep or not 0 <= keep[0] <= keep[-1] < count:
        raise UsageError(f"keep must name some of the layers 0 to {count - 1} in ascending order, got {keep}.")
    prefix, layers = decoder_layers(model)
    if not layers:
        raise UsageError(
            f"{type(model).__name__} has no list of its {count} decoder layers: build the student by hand."
        )

    config = copy.deepcopy(model.config)
    of_text = text_config(config)
    of_text.num_hidden_layers = len(keep)
    for name, value in vars(of_text).items():
        if isinstance(value, list) and len(value) == count:  # what a config says of each layer
            setattr(of_text, name, [value[index] for index in keep])
    pruned = new_model(type(model), config, model.dtype)
    nn.Module.to(pruned, model.device)
    others = {name: weight for name, weight in model.state_dict().items() if not name.startswith(f"{prefix}.")}
    pruned.load_state_dict(others, strict=False)
    for new, old in enumerate(keep):
        pruned.get_submodule(f"{prefix}.{new}").load_state_dict(layers[old].state_dict())
    pruned.generation_config = copy.deepcopy(model.generation_config)

    def skip(layer: nn.Module, args: Any, kwargs: Any, output: Any) -> Any:
        hidden = args[0] if args else kwargs["hidden_states"]
        return (hidden, *output[1:]) if isinstance(output, tuple) else hidden

    dropped = [layer for index, layer in enumerate(layers) if index not in keep]
    hooks = [layer.register_forward_hook(skip, with_kwargs=True) for layer in dropped]
    tokens = torch.arange(PROBE_TOKENS, device=model.device)[None] % text_config(model.config).vocab_size
    row = {"input_ids": tokens, "attention_mask": torch.ones_like(tokens)}
    try:
        with torch.no_grad(), evaluating(model), evaluating(pruned):
            expected, ours = (one(**row, use_cache=False).logits for one in (model, pruned))
    finally:
        for hook in hooks:
            hook.remove()
    if outputs_differ(expected, ours):
        raise UsageError(
            f"{type(model).__name__} with layers {keep} does not give what it gives with the others skipped: "
            "its layers depend on their numbers; build the student by hand."
        )
    return pruned.train(model.training)


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Without dropout, which would make two runs differ; every module's mode is put back."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True


def outputs_differ(one: Tensor, other: Tensor, coarse: float = 2e-2) -> bool:
    """Whether logits differ by more than rounding; NaN is for the loss to report."""
    tolerance = 1e-4 if one.dtype in (torch.float32, torch.float64) else coarse
    return bool((one.double() - other.double()).norm() > tolerance * one.double().norm())
