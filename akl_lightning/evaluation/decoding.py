"""How an answer is decoded: greedily, or drawn in a way that a run can be repeated and broken off anywhere."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import LogitsProcessor, LogitsProcessorList, TemperatureLogitsWarper, TopPLogitsWarper

from akl_lightning.errors import UsageError, check_count


@dataclass(frozen=True)
class Decoding:
    """How answers are decoded.

    Args:
        max_new_tokens: length of an answer.
        seeds: an answer is drawn for each of them, in the paper 10, 20, 30, 40 and 50; none for one greedy answer.
        temperature: of the draw.
        top_p: the smallest set of likeliest tokens with this mass is drawn from; 1 for all.

    Raises:
        UsageError: a value out of its range.
    """

    max_new_tokens: int = 256
    seeds: tuple[int, ...] = ()
    temperature: float = 1.0
    top_p: float = 1.0

    def __post_init__(self) -> None:
        if len(set(self.seeds)) < len(self.seeds):
            raise UsageError(f"decoding.seeds must differ, got {list(self.seeds)}.")
        check_drawn("decoding", self, greedy="; give no seeds for greedy")

    def arguments(self, prompts: Sequence[str], seed: int | None) -> dict[str, Any]:
        """What ``transformers``' ``generate`` is called with.

        Args:
            prompts: the texts of the rows.
            seed: of this answer; None for greedy.
        """
        arguments: dict[str, Any] = {"max_new_tokens": self.max_new_tokens}
        if seed is not None:
            seeds = [seed_of(seed, prompt) for prompt in prompts]
            arguments["logits_processor"] = draw(seeds, self)
        return arguments


@dataclass(frozen=True)
class Sampling:
    """How rollouts are sampled.

    Args:
        max_new_tokens: length of a rollout at most, its end token included.
        temperature: of the draw.
        top_p: the smallest set of likeliest tokens with this mass is drawn from; 1 for all.

    Raises:
        UsageError: a value out of its range.
    """

    max_new_tokens: int = 256
    temperature: float = 1.0
    top_p: float = 1.0

    def __post_init__(self) -> None:
        check_drawn("on_policy.decoding", self)


def check_drawn(name: str, drawn: Decoding | Sampling, greedy: str = "") -> None:
    """Raise :class:`UsageError` for a value out of its range; ``greedy`` says what to do for the likeliest tokens."""
    check_count(f"{name}.max_new_tokens", drawn.max_new_tokens)
    if not drawn.temperature > 0:
        raise UsageError(f"{name}.temperature must be above 0, got {drawn.temperature}{greedy}.")
    if not 0 < drawn.top_p <= 1:
        raise UsageError(f"{name}.top_p must be above 0 and at most 1, got {drawn.top_p}.")


def draw(seeds: Sequence[int], drawn: Decoding | Sampling) -> LogitsProcessorList:
    """What leaves one token in each row, drawn by the row's own seed."""
    steps: list[LogitsProcessor] = [TemperatureLogitsWarper(drawn.temperature)] if drawn.temperature != 1 else []
    steps += [TopPLogitsWarper(drawn.top_p)] if drawn.top_p < 1 else []
    return LogitsProcessorList([*steps, SeededDraw(seeds, drawn.max_new_tokens)])


class SeededDraw(LogitsProcessor):
    """Leaves but one token in each row, drawn with numbers that depend on the row's seed alone.

    ``generate`` draws a whole batch from one stream, so that an answer would depend on what else is in the batch: on
    the number of devices, and on where an interrupted run goes on.

    Args:
        seeds: of the rows, see :func:`seed_of`.
        length: of the answers, in tokens.
    """

    def __init__(self, seeds: Sequence[int], length: int) -> None:
        generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        self.draws = torch.stack([torch.rand(length, generator=generator) for generator in generators])
        self.step = 0

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Logits ``[batch, vocab]`` in which one token is left in each row.

        Raises:
            UsageError: they hold NaN.
        """
        draw = self.draws[:, self.step, None].to(scores.device, torch.float64)
        self.step += 1
        mass = scores.double().softmax(-1).cumsum(-1)
        if mass[:, -1].isnan().any():
            raise UsageError("the model gives NaN, nothing can be drawn from it: look at its weights and precision.")
        drawn = torch.searchsorted(mass, draw * mass[:, -1:], right=True)
        return torch.full_like(scores, -torch.inf).scatter(-1, drawn, 0.0)


def seed_of(*parts: object) -> int:
    """A seed that depends on all of these and on nothing else, the same in every process.

    >>> seed_of(0, "Add 1 and 2."), seed_of(0, "Add 1 and 3.")
    (29482820700970301, 68547001823660404)
    """
    return int.from_bytes(hashlib.blake2b("\0".join(map(str, parts)).encode(), digest_size=7).digest())
