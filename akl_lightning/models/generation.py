"""Answers decoded as they are asked for; of a model's own generation config only where they end is taken over."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import takewhile
from typing import Any

import transformers
from transformers import GenerationConfig, PreTrainedTokenizerBase


def stop_tokens(
    model: object, tokenizer: PreTrainedTokenizerBase | None, end_tokens: Sequence[int] | None = None
) -> list[int]:
    """Tokens any of which ends an answer, each once.

    Args:
        model: those of its generation config.
        tokenizer: its end of text, where it is known; the first.
        end_tokens: with which the template of the data ends a turn, where it is known.
    """
    named = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    own = [] if named is None else [named] if isinstance(named, int) else list(named)
    first = [] if tokenizer is None or tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    return list(dict.fromkeys([*first, *(end_tokens or ()), *own]))


def ending(ends: Sequence[int], tokenizer: PreTrainedTokenizerBase | None) -> dict[str, Any]:
    """What tells ``transformers`` to end an answer at any of these tokens, and to fill up what is behind.

    Args:
        ends: the :func:`stop_tokens`.
        tokenizer: whose padding is taken, if it has any; else the first of them.
    """
    if not ends:
        return {}
    pad = None if tokenizer is None else tokenizer.pad_token_id
    eos = list(ends) if len(ends) > 1 else ends[0]  # not every module of a user's own takes a list
    return {"eos_token_id": eos, "pad_token_id": ends[0] if pad is None else pad}


def up_to_end(tokens: Sequence[int], ends: Sequence[int]) -> list[int]:
    """An answer without the token that ends it, which a tokenizer need not know to be special, and what is behind.

    Args:
        tokens: of the answer; where none of them ends it, it was cut off, and all of it is given.
        ends: the :func:`stop_tokens`.

    >>> up_to_end([5, 2, 0], [1, 2]), up_to_end([7, 8, 9], [1, 2])
    ([5], [7, 8, 9])
    """
    return list(takewhile(lambda token: token not in ends, tokens))


@contextmanager
def plain_decoding(model: "transformers.PreTrainedModel") -> Iterator[None]:
    """Let a model's generation config say nothing.

    ``generate`` fills in from it whatever the call leaves open: penalties, tokens that are forced, forbidden or
    favoured, guidance. One that is passed does not keep it from that.
    """
    own, model.generation_config = model.generation_config, GenerationConfig()
    try:
        yield
    finally:
        model.generation_config = own
