"""What one watches of rollouts: means as torchmetrics, and warnings that name a cause."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor
from torchmetrics import Metric, MetricCollection

from akl_lightning.metrics import AlignedShare, TokenMean
from akl_lightning.rollouts.batches import Answer, RolloutTokens

WINDOW = 64
"""Rollouts that a warning looks back on."""

_SHORT, _SURE, _APART = 0.2, 0.05, 0.2

MEANS = ("length", "cut", "entropy", "divergence", "top1_agreement")
"""Logged as ``train/rollout_…``; ``entropy`` is the mean of minus the log probability that the student gives to the
tokens that it has drawn, an unbiased estimate of its entropy where temperature and top-p are 1. With a teacher of
another tokenizer, all but the first two are of the tokens that are aligned, whose share is ``rollout_aligned``."""


class Ratio(Metric):
    """The sum of one number over the sum of another, in float64.

    Args:
        above: the keyword under which :meth:`update` finds the first.
        below: and the second.

    >>> speed = Ratio("tokens", "seconds")
    >>> speed.update(tokens=6.0, seconds=2.0)
    >>> speed.update(tokens=6.0, seconds=1.0)
    >>> speed.compute()
    tensor(4., dtype=torch.float64)
    """

    full_state_update = False
    total_above: Tensor
    total_below: Tensor

    def __init__(self, above: str, below: str, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.names = above, below
        for state in ("total_above", "total_below"):
            self.add_state(state, torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")

    def update(self, **numbers: Any) -> None:
        """Add both; without them nothing."""
        if self.names[0] in numbers and self.names[1] in numbers:
            self.total_above = self.total_above + numbers[self.names[0]]
            self.total_below = self.total_below + numbers[self.names[1]]

    def compute(self) -> Tensor:
        """The ratio, a scalar; NaN before the first update."""
        return self.total_above / self.total_below


def add_rollout_metrics(train: MetricCollection) -> None:
    """Add what is logged of rollouts to the metrics of training: :data:`MEANS`, and what sampling takes.

    ``sampling_share`` is the share of the time of all training batches, ``sampling_tokens_per_second`` counts those of
    a device.
    """
    train.add_metrics({f"rollout_{name}": TokenMean(f"rollout_{name}") for name in MEANS})
    train.add_metrics({"rollout_aligned": AlignedShare("rollout_aligned")})
    train.add_metrics({"sampling_share": Ratio("sampling_seconds", "seconds")})
    train.add_metrics({"sampling_tokens_per_second": Ratio("sampled_tokens", "sampling_seconds")})


def statistics_of(rollouts: RolloutTokens, statistics: dict[str, Tensor]) -> dict[str, Tensor]:
    """What :data:`MEANS` are the means of, from the statistics ``[tokens]`` of a batch."""
    return {
        "rollout_length": rollouts.lengths,
        "rollout_cut": rollouts.cut,
        "rollout_aligned": rollouts.aligned,
        "rollout_entropy": statistics["cross_entropy"][rollouts.own],
        "rollout_divergence": statistics["divergence"][rollouts.places],
        "rollout_top1_agreement": statistics["top1_agreement"][rollouts.places],
    }


class Seen(NamedTuple):
    """What a rank has seen since the ranks last met."""

    lengths: list[int]
    """Of the student's new rollouts, in tokens."""

    cut: list[bool]
    """Whether each was cut off."""

    entropy: float
    """Summed over the tokens that it has learnt from."""

    tokens: int

    aligned: list[tuple[int, int]]
    """Of each that a teacher with another tokenizer has read: how many of its tokens are aligned, and of how many."""

    beyond: int
    """How many of these fill the teacher's positions, or find none."""


class Watch:
    """Warns once of each thing that goes wrong with the student's own rollouts, those of all ranks."""

    def __init__(self) -> None:
        self.forget()

    def forget(self) -> None:
        """Begin anew."""
        self._lengths: list[int] = []
        self._cut: list[bool] = []
        self._entropies: list[tuple[Tensor, int]] = []
        self._entropy, self._tokens = 0.0, 0
        self._read: list[tuple[int, int]] = []
        self._beyond, self._positions = 0, 0
        self._aligned: list[tuple[int, int]] = []
        self._start: float | None = None
        self._said: list[str] = []

    def state(self) -> dict[str, Any]:
        """What a run that goes on has to know; the same on all ranks."""
        seen = {"lengths": self._lengths, "cut": self._cut, "aligned": self._aligned}
        return {**seen, "start": self._start, "said": self._said}

    def load(self, state: dict[str, Any]) -> None:
        """Go on."""
        self._lengths, self._cut = list(state["lengths"]), list(state["cut"])
        self._aligned = [(aligned, tokens) for aligned, tokens in state.get("aligned", ())]  # there is none in old ones
        self._start, self._said = state["start"], list(state["said"])

    def add_entropy(self, of_tokens: Tensor) -> None:
        """Keep those of a batch, to be read when the device has to be waited for anyway.

        Args:
            of_tokens: minus the log probability of each token that the student has drawn.
        """
        if of_tokens.numel():
            self._entropies.append((of_tokens.sum(), of_tokens.numel()))

    def add_aligned(self, aligned: list[tuple[int, int]], beyond: int, positions: int | None) -> None:
        """Keep what a teacher with another tokenizer has read.

        Args:
            aligned: see :class:`Seen`.
            beyond: likewise.
            positions: of the teacher; None for any number.
        """
        self._read += aligned
        self._beyond += beyond
        self._positions = positions or 0

    def seen(self, rollouts: Sequence[Answer]) -> Seen:
        """What this rank has seen, once.

        Args:
            rollouts: new ones; the student's own count.
        """
        own = [answer for answer in rollouts if answer.own]
        entropy = float(torch.stack([total for total, _ in self._entropies]).sum()) if self._entropies else 0.0
        tokens = sum(count for _, count in self._entropies)
        self._entropies.clear()
        read, beyond = self._read, self._beyond
        self._read, self._beyond = [], 0
        lengths, cut = [len(answer.tokens) for answer in own], [answer.cut for answer in own]
        return Seen(lengths, cut, entropy, tokens, read, beyond)

    def look(self, ranks: Sequence[Seen]) -> None:
        """Look at what all ranks have seen."""
        self._lengths = (self._lengths + [length for seen in ranks for length in seen.lengths])[-WINDOW:]
        self._cut = (self._cut + [cut for seen in ranks for cut in seen.cut])[-WINDOW:]
        self._entropy += sum(seen.entropy for seen in ranks)
        self._tokens += sum(seen.tokens for seen in ranks)
        if len(self._lengths) == WINDOW:
            mean = sum(self._lengths) / WINDOW
            if self._start is None:
                self._start = mean
            if mean < _SHORT * self._start:
                self._say(
                    "short",
                    f"rollouts have collapsed from {self._start:.0f} to {mean:.0f} tokens on the mean of {WINDOW}: the "
                    "student ends at once to avoid the teacher's surprise; lower the learning rate, or give a smaller "
                    "on_policy.share or a forward divergence (ForwardKL, AdaptiveKL) to on_policy.divergence.",
                )
            if all(self._cut):
                self._say(
                    "cut",
                    f"the last {WINDOW} rollouts were all cut off, so that no end is learnt: raise "
                    "on_policy.decoding.max_new_tokens, or train off-policy first, until the student ends its answers.",
                )
        self._look_at_aligned(ranks)
        if self._tokens >= WINDOW:
            entropy = self._entropy / self._tokens
            self._entropy, self._tokens = 0.0, 0
            if entropy < _SURE:
                self._say(
                    "sure",
                    f"the student's entropy on its rollouts is {entropy:.3f} nats a token: it repeats itself and finds "
                    "nothing new to be corrected on; lower the learning rate, raise on_policy.decoding.temperature, or "
                    "give a smaller on_policy.share.",
                )

    def _look_at_aligned(self, ranks: Sequence[Seen]) -> None:
        aligned = [counts for seen in ranks for counts in seen.aligned]
        self._aligned = (self._aligned + aligned)[-WINDOW:]
        if beyond := sum(seen.beyond for seen in ranks):
            self._say(
                "beyond",
                f"{beyond:,} of {len(aligned):,} rollouts fill the {self._positions:,} positions of the teacher with "
                "its own tokens, what lies behind is not learnt: lower on_policy.decoding.max_new_tokens.",
            )
        found, tokens = (sum(numbers) for numbers in zip((0, 0), *self._aligned, strict=True))
        if len(self._aligned) == WINDOW and found < _APART * tokens:
            self._say(
                "apart",
                f"of the {tokens:,} tokens of the last {WINDOW} rollouts only {found:,} are aligned with the "
                "teacher's, the others are not learnt: the student says half characters or special tokens, behind "
                "which nothing is aligned; train off-policy first, or give a smaller on_policy.decoding.temperature.",
            )

    def _say(self, what: str, sentence: str) -> None:
        if what not in self._said:
            self._said.append(what)
            rank_zero_warn(sentence)
