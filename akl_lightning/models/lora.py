"""Adapters through PEFT: a new one of low rank on the student, and those that lie in a folder."""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import transformers
from torch import nn
from transformers.utils import find_adapter_config_file

from akl_lightning.errors import UsageError


@dataclass(frozen=True)
class LoraSettings:
    """An adapter of low rank, arXiv 2106.09685: each target's weight ``W`` becomes ``W + alpha / rank * B A``.

    Args:
        rank: columns of ``B`` and rows of ``A``.
        alpha: scale.
        dropout: of the adapter's inputs.
        target_modules: ends of the names of the layers that get one; None for PEFT's choice for the kind of model.
    """

    rank: int = 8
    alpha: int = 16
    dropout: float = 0.0
    target_modules: list[str] | None = None


def base_of_adapter(source: str) -> str | None:
    """Name or folder of the model that an adapter was made for; None for what is no adapter, or a whole model as well.

    Args:
        source: hub name or local folder.

    Raises:
        UsageError: an adapter that does not say.
    """
    config = find_adapter_config_file(source)
    if config is None or Path(source, "config.json").exists():
        return None
    base = json.loads(Path(config).read_text(encoding="utf-8")).get("base_model_name_or_path")
    if not base:
        raise UsageError(
            f"the adapter in {source!r} does not say of which model it is: write base_model_name_or_path into its "
            "adapter_config.json."
        )
    return base


def put_on_adapter(base: nn.Module, source: str) -> nn.Module:
    """An adapter of a folder or the hub on its model, whose weights are frozen; the adapter's go on being trained.

    Raises:
        UsageError: PEFT is not installed.
    """
    try:
        from peft import PeftConfig, PeftModel
    except ImportError as error:
        raise UsageError(f'{source!r} is an adapter and needs PEFT: pip install -e ".[peft]".') from error
    prompts = PeftConfig.from_pretrained(source).is_prompt_learning
    model = PeftModel.from_pretrained(base, source, is_trainable=not prompts)
    if prompts:  # which PEFT reads as what they are, no longer as what made them, and does not train by itself
        for encoder in model.prompt_encoder.values():
            getattr(encoder, "delta_embedding", encoder).requires_grad_(True)  # of CPT the change alone
    return model


def virtual_tokens(model: nn.Module) -> int:
    """How many positions of prompt tuning, p-tuning or prefix tuning stand before a sample."""
    config: Any = getattr(model, "active_peft_config", None)
    return config.num_virtual_tokens if getattr(config, "is_prompt_learning", False) else 0


def adapter_parameters(model: nn.Module) -> Iterator[nn.Parameter]:
    """The parameters that a model has beyond those of the one that it adapts."""
    for module in model.modules():
        for name in getattr(module, "adapter_layer_names", ()):
            layer: Any = module
            for part in name.split("."):
                layer = getattr(layer, part, None)
            if isinstance(layer, nn.Module):
                yield from layer.parameters()
            elif isinstance(layer, nn.Parameter):
                yield layer
    prompts = getattr(model, "prompt_encoder", None)
    if isinstance(prompts, nn.Module):
        yield from prompts.parameters()


def add_lora(model: nn.Module, settings: LoraSettings) -> nn.Module:
    """Freeze a ``transformers`` model and give it a LoRA adapter, which is what is trained.

    Raises:
        UsageError: PEFT is not installed, or the model has no such layers.
    """
    try:
        from peft import LoraConfig, get_peft_model
    except ImportError as error:
        raise UsageError('model.lora needs PEFT: pip install -e ".[peft]".') from error
    if not isinstance(model, transformers.PreTrainedModel):
        raise UsageError(f"model.lora adapts transformers models, not a {type(model).__name__}: leave it out.")
    try:
        config = LoraConfig(
            task_type="CAUSAL_LM",
            r=settings.rank,
            lora_alpha=settings.alpha,
            lora_dropout=settings.dropout,
            target_modules=settings.target_modules,
        )
        return get_peft_model(model, config)
    except ValueError as error:
        reason = str(error).split(". ")[0].splitlines()[0]
        if "target" in reason.lower():
            matrices = [name for name, weight in model.named_parameters() if weight.dim() == 2]
            layers = {name.removesuffix(".weight").rpartition(".")[2] for name in matrices}
            reason += f"; set target_modules, the layers are {', '.join(sorted(layers))}"
        raise UsageError(f"model.lora: {reason}.") from error
