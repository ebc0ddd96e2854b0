"""Rollouts through continuous batching: a row that has ended makes room for the next prompt at once."""

import math
from collections.abc import Sequence
from dataclasses import fields
from typing import Any

import torch
from transformers import ContinuousBatchingConfig, GenerationConfig

from akl_lightning.checkpoint import random_states, set_random_states
from akl_lightning.compat import attention_of
from akl_lightning.errors import UsageError
from akl_lightning.evaluation.decoding import seed_of
from akl_lightning.models.generation import plain_decoding
from akl_lightning.models.layers import text_config
from akl_lightning.rollouts.engines import Engine, Sampling, Weights

PAGE = 256
"""Tokens whose keys and values lie in one piece, as kernels for paged attention want it."""


class ContinuousBatching(Engine):
    """``transformers``' ``generate_batch``: paged attention, CUDA graphs where the attention allows for them.

    A response depends on all prompts that are answered with it. The global random numbers are put back afterwards.

    Args:
        memory: GiB that keys and values may take; less where all of them fit into less.

    Raises:
        UsageError: a model that is no ``transformers`` model, or logits that hold NaN.
    """

    def __init__(self, memory: float = 8.0) -> None:
        if not memory > 0:
            raise UsageError(f"engine.memory must be above 0, got {memory}.")
        self.memory = memory
        self._weights: Weights | None = None

    def refresh(self, weights: Weights) -> None:
        """Keep them; nothing is copied."""
        if weights.model.causal_lm is None or not hasattr(weights.model.causal_lm, "generate_batch"):
            raise UsageError(
                f"{weights.model.description} has no continuous batching: give on_policy.engine GenerateEngine."
            )
        self._weights = weights

    def generate(self, prompts: Sequence[Sequence[int]], decoding: Sampling, seeds: Sequence[int]) -> list[list[int]]:
        """Answer all of them in one go, with one stream of random numbers that the seeds begin."""
        assert self._weights is not None, "refresh comes first"
        model: Any = self._weights.model.causal_lm
        # On a GPU, a draw from NaN would be an assertion on the device, after which nothing works.
        first = torch.tensor([list(prompts[0])], device=model.device)
        if model(input_ids=first, use_cache=False).logits.isnan().any():
            raise UsageError("the model gives NaN, nothing can be drawn from it: look at its weights and precision.")
        states, attention = random_states(), attention_of(model)
        settings = GenerationConfig(
            do_sample=True,
            temperature=decoding.temperature,
            top_p=decoding.top_p,
            top_k=0,
            max_new_tokens=decoding.max_new_tokens,
            eos_token_id=list(self._weights.ends),
            pad_token_id=self._weights.pad,
        )
        try:
            with plain_decoding(model):
                outputs = model.generate_batch(
                    [list(prompt) for prompt in prompts],
                    generation_config=settings,
                    continuous_batching_config=self._settings(model, prompts, decoding, seeds),
                    progress_bar=False,
                )
        finally:
            set_random_states(states)
            if attention_of(model) != attention:
                model.set_attn_implementation(attention)
        failed = [output.error for output in outputs.values() if output.error is not None]
        if failed or len(outputs) < len(prompts):
            raise RuntimeError(failed[0] if failed else f"{len(prompts) - len(outputs)} prompts were not answered")
        return [list(output.generated_tokens) for output in outputs.values()]

    def _settings(
        self, model: Any, prompts: Sequence[Sequence[int]], decoding: Sampling, seeds: Sequence[int]
    ) -> ContinuousBatchingConfig:
        config = text_config(model.config)
        heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
        width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        block = PAGE * config.num_hidden_layers * 2 * heads * width * model.dtype.itemsize
        # One more for each, so that none waits for its last token.
        wanted = sum(math.ceil((len(prompt) + decoding.max_new_tokens) / PAGE) + 1 for prompt in prompts)
        fitting = int(self.memory * 2**30 / block)
        longest = math.ceil((max(map(len, prompts)) + decoding.max_new_tokens) / PAGE) + 1
        if fitting < longest:
            raise UsageError(
                f"engine.memory = {self.memory} GiB holds no response to the longest prompt, which takes "
                f"{longest * block / 2**30:.2g}: raise it."
            )
        known = {field.name for field in fields(ContinuousBatchingConfig)}
        page: dict[str, Any] = {
            "page_size" if "page_size" in known else "block_size": PAGE
        }  # as it was called up to transformers 5.17
        return ContinuousBatchingConfig(**page, num_blocks=min(wanted, fitting), seed=seed_of(*seeds) % 2**32)
