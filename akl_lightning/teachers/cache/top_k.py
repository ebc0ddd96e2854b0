"""The largest log-probabilities alone, as most distillation code stores them."""

from collections.abc import Mapping

import torch
from torch import Tensor

from akl_lightning.projection import Projection, TopLogProbs

_ROWS = 64
"""Tokens whose logits exist at a time."""


def encode_top_k(logits: Tensor | Projection, k: int) -> dict[str, Tensor]:
    """Keep the ``k`` largest log-probabilities of each token, and the mass of all others: ``6 k + 2`` bytes.

    Args:
        logits: ``[tokens, vocab]``, or what gives them.
        k: less than the vocabulary.

    >>> parts = encode_top_k(torch.tensor([[3.0, 1.0, 2.0, 0.0]]), 2)
    >>> parts["tokens"].tolist(), parts["log_probs"].exp().sum() + parts["rest"].exp()
    ([[0, 2]], tensor([[1.]], dtype=torch.float16))
    """
    whole = logits if isinstance(logits, Tensor) else logits.hidden
    parts = []
    for rows in whole.split(_ROWS) if len(whole) else [whole]:
        dense = rows if isinstance(logits, Tensor) else Projection(rows, logits.head, logits.soft_cap).logits()
        log_probs = dense.float().log_softmax(-1)
        top, tokens = log_probs.topk(k)
        # Summed up over the others, not as what is missing from 1: of a small rest nothing would be left.
        rest = log_probs.scatter(-1, tokens, -torch.inf).logsumexp(-1, keepdim=True)
        parts.append({"log_probs": top.half(), "tokens": tokens.int(), "rest": rest.half()})
    return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}


def decode_top_k(parts: Mapping[str, Tensor], vocab_size: int) -> TopLogProbs:
    """What the criterion takes, from what :func:`encode_top_k` gave."""
    return TopLogProbs(parts["log_probs"].float(), parts["tokens"].long(), parts["rest"].float(), vocab_size)
