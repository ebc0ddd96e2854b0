"""Rollouts through continuous batching: a row that has ended makes room for the next prompt at once."""

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import fields
from typing import Any

import torch
from torch import Tensor
from transformers import ContinuousBatchingConfig, GenerationConfig

from akl_lightning.checkpoint import random_states, set_random_states
from akl_lightning.compat import attention_of, put_batching_manager, take_batching_manager
from akl_lightning.errors import UsageError
from akl_lightning.evaluation.decoding import Sampling, seed_of
from akl_lightning.models.generation import plain_decoding
from akl_lightning.models.layers import text_config
from akl_lightning.rollouts.engines import Engine, Weights

PAGE = 256
"""Tokens whose keys and values lie in one piece, as kernels for paged attention want it."""


class ContinuousBatching(Engine):
    """``transformers``' continuous batching: paged attention, CUDA graphs where the attention allows for them.

    What it makes itself ready with, keys and values and graphs, is kept from one call to the next while the model, the
    sampling and, to a power of two, the number and the length of the prompts are the same. The weights may change in
    place meanwhile.

    A response depends on all prompts that are answered with it. The global random numbers are put back afterwards.

    Args:
        memory: GiB that keys and values may take, in training too; less where all of them fit into less.

    Raises:
        UsageError: a model that is no ``transformers`` model, or logits that hold NaN.
    """

    def __init__(self, memory: float = 8.0) -> None:
        if not memory > 0:
            raise UsageError(f"engine.memory must be above 0, got {memory}.")
        self.memory = memory
        self._weights: Weights | None = None
        self._ready: tuple[GenerationConfig, ContinuousBatchingConfig] | None = None
        """What is kept was made for these."""
        self._manager: Any = None
        """What is kept."""
        self._nan: Tensor | None = None
        """Whether logits held NaN, on the device; captured graphs write to it."""

    def refresh(self, weights: Weights) -> None:
        """Keep them; nothing is copied."""
        if weights.model.causal_lm is None or not hasattr(weights.model.causal_lm, "generate_batch"):
            raise UsageError(
                f"{weights.model.description} has no continuous batching: give on_policy.engine GenerateEngine."
            )
        if self._weights is not None and weights.model is not self._weights.model:
            self.release()
        self._weights = weights

    def release(self) -> None:
        """Free keys, values and graphs."""
        if self._manager is not None:
            self._manager.destroy()
        self._weights = self._ready = self._manager = self._nan = None

    @torch.inference_mode(False)  # or what a validation has made could not be used in training
    @torch.no_grad()
    def generate(self, prompts: Sequence[Sequence[int]], decoding: Sampling, seeds: Sequence[int]) -> list[list[int]]:
        """Answer all of them in one go, with one stream of random numbers that the seeds begin."""
        assert self._weights is not None, "refresh comes first"
        weights = self._weights
        model: Any = weights.model.causal_lm
        settings = GenerationConfig(
            do_sample=True,
            temperature=decoding.temperature,
            top_p=decoding.top_p,
            top_k=0,
            max_new_tokens=decoding.max_new_tokens,
            eos_token_id=list(weights.ends),
            pad_token_id=weights.pad,
        )
        ready = settings, self._settings(model, prompts, decoding)
        if self._ready != ready:
            self.release()
            self._weights, self._ready = weights, ready
            self._nan = torch.zeros((), dtype=torch.bool, device=model.device)
        states, attention = random_states(), attention_of(model)
        try:
            with (
                weights.model.eagerly(),
                plain_decoding(model),
                model.register_forward_hook(self._note_nan),
                self._kept_on(model),
            ):
                outputs = _answers(model, ready, prompts, seed_of(*seeds))
            if self._nan:
                raise UsageError("the model gives NaN, nothing can be drawn from it: look at its weights and precision")
        except BaseException:
            self.release()  # who knows in what state it is
            raise
        finally:
            set_random_states(states)
            if attention_of(model) != attention:
                model.set_attn_implementation(attention)
        return outputs

    @contextmanager
    def _kept_on(self, model: Any) -> Iterator[None]:
        """Have on the model what is kept, and no longer: a student that is trained may be copied meanwhile."""
        put_batching_manager(model, self._manager)
        try:
            yield
        finally:
            self._manager = take_batching_manager(model)

    def _note_nan(self, module: Any, inputs: Any, output: Any) -> None:
        """Draw something from NaN, and remember: on a GPU it would be an assertion, after which nothing works."""
        self._nan.logical_or_(output.logits.isnan().any())  # type: ignore[union-attr]
        output.logits = output.logits.nan_to_num(nan=0.0, posinf=math.inf, neginf=-math.inf)

    def _settings(self, model: Any, prompts: Sequence[Sequence[int]], decoding: Sampling) -> ContinuousBatchingConfig:
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
        return ContinuousBatchingConfig(
            **page,
            num_blocks=min(_power_of_two(wanted), fitting),
            max_requests_per_batch=min(_power_of_two(len(prompts)), 1024),  # as it is without
            # Blocks that are shared outlive a call, and the weights that they were computed with.
            allow_block_sharing=False,
            seed=0,  # another one is set before each call
        )


def _answers(
    model: Any,
    settings: tuple[GenerationConfig, ContinuousBatchingConfig],
    prompts: Sequence[Sequence[int]],
    seed: int,
) -> list[list[int]]:
    """``generate_batch`` by hand, as that warns of what is kept, each time."""
    how, sizes = settings
    session = model.continuous_batching_context_manager(
        how, continuous_batching_config=sizes, persistent_manager=True, timeout=5
    )
    with session as manager:
        torch.manual_seed(seed % 2**32)  # here, as a first session draws while it makes itself ready
        names = manager.add_requests([list(prompt) for prompt in prompts], how.max_new_tokens)
        found: dict[str, list[int]] = {}
        while len(found) < len(names):
            output = manager.get_result(timeout=1)
            if output is None and not manager.is_running():
                raise RuntimeError(f"{len(names) - len(found)} prompts were not answered")
            if output is not None and output.error is not None:
                raise RuntimeError(output.error)
            if output is not None and output.is_finished():
                found[output.request_id] = list(output.generated_tokens)
    return [found[name] for name in names]


def _power_of_two(number: int) -> int:
    """The next one, so that nothing has to be made anew for a few prompts more or less."""
    return 1 << (number - 1).bit_length()
