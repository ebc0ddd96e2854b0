"""Answers decoded as they are asked for: a model's own generation config says where they end, and nothing else."""

from collections.abc import Iterator
from contextlib import contextmanager

from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase


def stop_tokens(model: object, tokenizer: PreTrainedTokenizerBase | None) -> list[int]:
    """Tokens that end an answer: the tokenizer's end of text, and those of a model's generation config."""
    named = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    own = [] if named is None else [named] if isinstance(named, int) else list(named)
    first = [] if tokenizer is None or tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    return list(dict.fromkeys([*first, *own]))


@contextmanager
def plain_decoding(model: PreTrainedModel) -> Iterator[None]:
    """Let a model's generation config say nothing.

    ``generate`` fills in from it whatever the call leaves open: penalties, tokens that are forced, forbidden or
    favoured, guidance. One that is passed does not keep it from that.
    """
    own, model.generation_config = model.generation_config, GenerationConfig()
    try:
        yield
    finally:
        model.generation_config = own
