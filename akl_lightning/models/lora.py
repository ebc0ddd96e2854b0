"""A LoRA adapter on the student, through PEFT."""

from dataclasses import dataclass

from torch import nn
from transformers import PreTrainedModel

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


def add_lora(model: nn.Module, settings: LoraSettings) -> nn.Module:
    """Freeze a ``transformers`` model and give it a LoRA adapter, which is what is trained.

    Raises:
        UsageError: PEFT is not installed, or the model has no such layers.
    """
    try:
        from peft import LoraConfig, get_peft_model
    except ImportError as error:
        raise UsageError('model.lora needs PEFT: pip install -e ".[peft]".') from error
    if not isinstance(model, PreTrainedModel):
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
