"""Which tokenizer lies beside a model, and whether two of them give the same tokens the same ids."""

import math
from collections.abc import Mapping
from typing import Any

from torch import nn
from transformers import PreTrainedTokenizerBase

from akl_lightning.errors import UsageError
from akl_lightning.models.load import load_tokenizer


def name_of(source: nn.Module | Mapping[str, Any] | str | None) -> str | None:
    """What a model was read from, itself or the one whose layers it has; None where that is nothing with a name."""
    if isinstance(source, Mapping):
        source = source.get("layers_of")
    name = getattr(source, "name_or_path", None) if isinstance(source, nn.Module) else source
    return name if isinstance(name, str) and name else None


def tokenizer_of(
    source: nn.Module | Mapping[str, Any] | str | None, trust_remote_code: bool = False
) -> PreTrainedTokenizerBase | None:
    """The tokenizer that lies beside a model's weights, or None where nothing says which it is."""
    name = name_of(source)
    if name is None:
        return None
    try:
        tokenizer = load_tokenizer(name, trust_remote_code)
    except UsageError:  # a folder may well hold weights alone
        return None
    # Out of nothing, transformers makes some models' tokenizers with special tokens alone.
    return tokenizer if len(tokenizer) > len(tokenizer.all_special_tokens) else None


def name_for_tokens(models: Mapping[str, Any], trust_remote_code: bool = False) -> str | None:
    """The name of the model whose tokenizer data have that are for several.

    Args:
        models: what they are made of, under ``teacher``, ``student`` or others; the first one with a name is taken, but
            the student where it has a tokenizer with another vocabulary than the teacher's.
        trust_remote_code: run Python code that comes with a tokenizer.
    """
    names = {role: name for role, model in models.items() if (name := name_of(model)) is not None}
    if names.get("student") != names.get("teacher"):
        found = [tokenizer_of(names.get(role), trust_remote_code) for role in ("student", "teacher")]
        if None not in found and found[0].get_vocab() != found[1].get_vocab():  # type: ignore[union-attr]
            return names["student"]
    return next(iter(names.values()), None)


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
