"""Who samples rollouts: one small interface, and the way that works with any model on any device."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import NamedTuple

import torch

from akl_lightning.errors import check_count
from akl_lightning.evaluation.decoding import Sampling, draw
from akl_lightning.models.split import SplitModel
from akl_lightning.rollouts.batches import padded


class Weights(NamedTuple):
    """What an engine samples from."""

    model: SplitModel
    """Whole on this device, in eval mode; the training goes on with it, or it is a copy: it is not to be changed."""

    ends: tuple[int, ...]
    """Tokens that end a response; one at least."""

    pad: int
    """The padding token."""


class Engine(ABC):
    """Samples responses. Each process has one, and answers the prompts of its own samples.

    A user's own (another inference engine, another machine) brings the first two methods.
    """

    @abstractmethod
    def refresh(self, weights: Weights) -> None:
        """Sample from these weights from here on, until the next call.

        Args:
            weights: as they are now; what is not copied here changes with the next optimizer step.
        """

    @abstractmethod
    def generate(self, prompts: Sequence[Sequence[int]], decoding: Sampling, seeds: Sequence[int]) -> list[list[int]]:
        """Answer prompts.

        Args:
            prompts: token ids of each, one at least.
            decoding: how to sample.
            seeds: one for each prompt; the same ones, with the same weights, give the same responses, if the engine can
                do that.

        Returns:
            Token ids of a response for each prompt, in their order: up to its first end token, that included, or
            ``max_new_tokens`` of them. Whatever stands behind an end token is dropped by the caller.
        """

    def release(self) -> None:  # noqa: B027 (most keep nothing)
        """Free what is kept from one call to the next: a run has ended."""


class GenerateEngine(Engine):
    """``transformers``' ``generate`` with a key-value cache, on prompts of similar length at a time.

    A response depends on weights, prompt and seed alone, but for rounding.

    Args:
        batch_size: prompts at a time; None for 64 on a CPU, else 256.
    """

    def __init__(self, batch_size: int | None = None) -> None:
        check_count("engine.batch_size", batch_size)
        self.batch_size = batch_size
        self._weights: Weights | None = None

    def refresh(self, weights: Weights) -> None:
        """Keep them; nothing is copied."""
        self._weights = weights

    def generate(self, prompts: Sequence[Sequence[int]], decoding: Sampling, seeds: Sequence[int]) -> list[list[int]]:
        """Answer, the longest prompts first, so that what does not fit the memory fails at once."""
        assert self._weights is not None, "refresh comes first"
        model, ends, pad = self._weights
        parameter = next(model.parameters(), None)
        device = torch.device("cpu") if parameter is None else parameter.device
        rows = self.batch_size or (64 if device.type == "cpu" else 256)
        order = sorted(range(len(prompts)), key=lambda index: -len(prompts[index]))
        answers: list[list[int]] = [[]] * len(prompts)
        for start in range(0, len(order), rows):
            chosen = order[start : start + rows]
            batch = padded([torch.tensor(prompts[index]) for index in chosen], pad, "left")
            tokens = model.generate(
                {name: tensor.to(device) for name, tensor in batch.items()},
                None,
                max_new_tokens=decoding.max_new_tokens,
                eos_token_id=list(ends),
                pad_token_id=pad,
                logits_processor=draw([seeds[index] for index in chosen], decoding),
            )
            for index, answer in zip(chosen, tokens.tolist(), strict=True):
                answers[index] = answer
        return answers
