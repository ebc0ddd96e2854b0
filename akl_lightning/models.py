"""Load a causal language model and see it as a body, which gives hidden states, and a head, which projects them."""

import math
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from akl_lightning.errors import UsageError

Batch = Mapping[str, Any]
Result = TypeVar("Result")


def load_causal_lm(source: nn.Module | Mapping[str, Any] | str) -> nn.Module:
    """Get a causal language model.

    Args:
        source: a hub name or local folder, a ``transformers`` config as a mapping (``model_type`` and sizes; the
            weights are new), or a module, which is returned as it is.

    Raises:
        UsageError: the name, folder or config gives no model.
    """
    if isinstance(source, nn.Module):
        return source
    if isinstance(source, Mapping):
        if "model_type" not in source:
            raise UsageError(f"the model config {dict(source)} has no model_type: name one, gpt2 for example.")
        try:
            config = AutoConfig.for_model(**source)
        except ValueError as error:
            raise UsageError(f"transformers knows no model_type {source['model_type']!r}: use one it has.") from error
        return AutoModelForCausalLM.from_config(config)
    try:
        return AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
    except (OSError, ValueError) as error:
        raise UsageError(_cannot_load("model", source)) from error


def load_tokenizer(source: str) -> PreTrainedTokenizerBase:
    """Load the tokenizer of a hub name or local folder.

    Raises:
        UsageError: there is none.
    """
    try:
        return AutoTokenizer.from_pretrained(source)
    except (OSError, ValueError) as error:
        raise UsageError(_cannot_load("tokenizer", source)) from error


def _cannot_load(what: str, source: str) -> str:
    return (
        f"cannot load the {what} {source!r}: it is no local folder with a {what} in it, and the hub has none of that "
        f"name or cannot be reached; give the path of a local folder that save_pretrained wrote."
    )


def tokenizer_of(source: nn.Module | Mapping[str, Any] | str | None) -> PreTrainedTokenizerBase | None:
    """The tokenizer that lies beside a model's weights, or None where nothing says which it is."""
    name = getattr(source, "name_or_path", None) if isinstance(source, nn.Module) else source
    if not isinstance(name, str) or not name:
        return None
    try:
        return load_tokenizer(name)
    except UsageError:  # a folder may well hold weights alone
        return None


def check_same_vocabulary(
    teacher: PreTrainedTokenizerBase, student: PreTrainedTokenizerBase, names: tuple[str, str] = ("teacher", "student")
) -> None:
    """Raise :class:`UsageError` that names a differing token unless both give the same tokens the same ids."""
    mine, yours = teacher.get_vocab(), student.get_vocab()
    if mine == yours:
        return
    differing = {token for token in mine.keys() | yours.keys() if mine.get(token) != yours.get(token)}
    token = min(differing, key=lambda token: (mine.get(token, math.inf), yours.get(token, math.inf)))

    def place(vocabulary: dict[str, int], name: str) -> str:
        return f"id {vocabulary[token]} in the {name}'s" if token in vocabulary else f"missing from the {name}'s"

    raise UsageError(
        f"{names[0]} and {names[1]} disagree on the vocabulary at {len(differing)} tokens: {token!r} is "
        f"{place(mine, names[0])} and {place(yours, names[1])}; take models that share one tokenizer."
    )


class SplitModel(nn.Module):
    """A language model as body and head.

    A ``transformers`` causal language model is split: its body runs without the head, and only the positions asked
    for are projected onto the vocabulary. Any other module is called with the whole batch and must give logits
    ``[batch, length, vocab]``, alone or as ``.logits``.

    Args:
        model: the language model.
    """

    model: Any

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    @property
    def is_split(self) -> bool:
        """Whether body and head are known."""
        return isinstance(self.model, PreTrainedModel) and self.model.get_output_embeddings() is not None

    @property
    def config(self) -> Any:
        """The ``transformers`` config, or None."""
        return getattr(self.model, "config", None)

    @property
    def max_positions(self) -> int | None:
        """Longest sequence that the model has positions for, or None where it does not say."""
        return getattr(self.config, "max_position_embeddings", None)

    @property
    def vocab_size(self) -> int | None:
        """Width of the head, padding included, or None where the model does not say."""
        if self.is_split:
            return self.model.get_output_embeddings().weight.shape[0]
        return getattr(self.config, "vocab_size", None)

    def check_fits(self, name: str, tokenizer: PreTrainedTokenizerBase | None, max_length: int | None) -> None:
        """Raise :class:`UsageError` unless the model has a position and an output for all that the data may hold.

        Args:
            name: what the message calls the model.
            tokenizer: the data's, where there is one.
            max_length: tokens of the longest sequence, where it is known.
        """
        if max_length and self.max_positions and max_length > self.max_positions:
            raise UsageError(
                f"data.max_length = {max_length} is beyond the {self.max_positions} positions of the {name}: "
                f"set it to {self.max_positions} or less."
            )
        if tokenizer is not None and self.vocab_size and len(tokenizer) > self.vocab_size:
            token = tokenizer.convert_ids_to_tokens(self.vocab_size)
            raise UsageError(
                f"the {name} has no output for the token {token!r} (id {self.vocab_size}) of the data's tokenizer, "
                f"which has {len(tokenizer)} tokens: give the {name} vocab_size {len(tokenizer)} or more."
            )

    def hidden_states(self, batch: Batch) -> Tensor:
        """Run the body: ``[batch, length, hidden]``."""
        body = self.model.base_model
        return body(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], use_cache=False)[0]

    def project(self, hidden: Tensor) -> Tensor:
        """Run the head, with the scaling and soft-capping that its config asks for: ``[..., vocab]``."""
        logits = self.model.get_output_embeddings()(hidden)
        config = self.config
        if getattr(config, "logit_scale", None) is not None:  # Cohere
            logits = logits * config.logit_scale
        if getattr(config, "logits_scaling", None) is not None:  # Granite
            logits = logits / config.logits_scaling
        if getattr(config, "final_logit_softcapping", None) is not None:  # Gemma 2
            logits = torch.tanh(logits / config.final_logit_softcapping) * config.final_logit_softcapping
        return logits

    def forward(
        self, batch: Batch, positions: Tensor | None = None, consume: Callable[[Tensor], Result] | None = None
    ) -> Tensor | Result:
        """Logits, or whatever is made of them.

        Args:
            batch: ``input_ids`` and ``attention_mask``, each ``[batch, length]``.
            positions: boolean ``[batch, length]``; only these are projected.
            consume: called with the logits *inside* this forward, where the hooks of DDP and FSDP have the head's
                weight at hand; what it returns is returned.

        Returns:
            Logits ``[batch, length, vocab]``, or ``[tokens, vocab]`` with ``positions``, or what ``consume`` made.
        """
        if self.is_split:
            hidden = self.hidden_states(batch)
            logits = self.project(hidden if positions is None else hidden[positions])
        else:
            output = self.model(batch)
            logits = getattr(output, "logits", output)
            logits = logits if positions is None else logits[positions]
        return logits if consume is None else consume(logits)
