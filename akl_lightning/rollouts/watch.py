"""What one watches of rollouts: means as torchmetrics, and warnings that name a cause."""

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor
from torchmetrics import MetricCollection

from akl_lightning.metrics import AlignedShare, Sums, TokenMean
from akl_lightning.rollouts.batches import Answer, RolloutTokens

WINDOW = 64
"""Rollouts that a warning looks back on."""

_SHORT, _SURE, _APART = 0.2, 0.05, 0.2

MEANS = ("length", "cut", "entropy", "divergence", "top1_agreement")
"""Logged as ``train/rollout_…``; ``entropy`` is the mean of minus the log probability that the student gives to the
tokens that it has drawn, an unbiased estimate of its entropy where temperature and top-p are 1. With a teacher of
another tokenizer, all but the first two are of the tokens that are aligned, whose share is ``rollout_aligned``."""


class Ratio(Sums):
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

    total_above: Tensor
    total_below: Tensor

    def __init__(self, above: str, below: str, **kwargs: Any) -> None:
        super().__init__("total_above", "total_below", **kwargs)
        self.names = above, below

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


@dataclass
class Seen:
    """What a rank has seen since the ranks last met."""

    lengths: list[int] = field(default_factory=list)
    """Of the student's new rollouts, in tokens."""

    cut: list[bool] = field(default_factory=list)
    """Whether each was cut off."""

    entropy: float = 0.0
    """Summed over the tokens that it has learnt from."""

    tokens: int = 0

    aligned: list[tuple[int, int]] = field(default_factory=list)
    """Of each that a teacher with another tokenizer has read: how many of its tokens are aligned, and of how many."""

    beyond: int = 0
    """How many of these fill the teacher's positions, or find none."""


class Watch:
    """Warns once of each thing that goes wrong with the student's own rollouts, those of all ranks."""

    def __init__(self) -> None:
        self.forget()

    def forget(self) -> None:
        """Begin anew."""
        self._mine = Seen()
        self._entropies: list[Tensor] = []  # of this rank, a sum for each batch
        self._lengths: deque[int] = deque(maxlen=WINDOW)
        self._cut: deque[bool] = deque(maxlen=WINDOW)
        self._aligned: deque[tuple[int, int]] = deque(maxlen=WINDOW)
        self._entropy, self._tokens = 0.0, 0
        self._positions = 0
        self._start: float | None = None
        self._said: list[str] = []

    def state(self) -> dict[str, Any]:
        """What a run that goes on has to know; the same on all ranks."""
        seen = {"lengths": list(self._lengths), "cut": list(self._cut), "aligned": list(self._aligned)}
        return {**seen, "start": self._start, "said": self._said}

    def load(self, state: dict[str, Any]) -> None:
        """Go on."""
        self._lengths.extend(state["lengths"])
        self._cut.extend(state["cut"])
        self._aligned.extend(state.get("aligned", ()))  # there is none in old ones
        self._start, self._said = state["start"], list(state["said"])

    def add_entropy(self, of_tokens: Tensor) -> None:
        """Keep those of a batch, to be read when the device has to be waited for anyway.

        Args:
            of_tokens: minus the log probability of each token that the student has drawn.
        """
        if of_tokens.numel():
            self._entropies.append(of_tokens.sum())
            self._mine.tokens += of_tokens.numel()

    def add_aligned(self, aligned: list[tuple[int, int]], beyond: int, positions: int | None) -> None:
        """Keep what a teacher with another tokenizer has read.

        Args:
            aligned: see :class:`Seen`.
            beyond: likewise.
            positions: of the teacher; None for any number.
        """
        self._mine.aligned += aligned
        self._mine.beyond += beyond
        self._positions = positions or 0

    def seen(self, rollouts: Sequence[Answer]) -> Seen:
        """What this rank has seen, once.

        Args:
            rollouts: new ones; the student's own count.
        """
        seen, self._mine = self._mine, Seen()
        own = [answer for answer in rollouts if answer.own]
        seen.lengths, seen.cut = [len(answer.tokens) for answer in own], [answer.cut for answer in own]
        if self._entropies:
            seen.entropy = float(torch.stack(self._entropies).sum())
            self._entropies.clear()
        return seen

    def look(self, ranks: Sequence[Seen]) -> None:
        """Look at what all ranks have seen."""
        for seen in ranks:
            self._lengths.extend(seen.lengths)
            self._cut.extend(seen.cut)
            self._aligned.extend(seen.aligned)
            self._entropy += seen.entropy
            self._tokens += seen.tokens
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
        if beyond := sum(seen.beyond for seen in ranks):
            read = sum(len(seen.aligned) for seen in ranks)
            self._say(
                "beyond",
                f"{beyond:,} of {read:,} rollouts fill the {self._positions:,} positions of the teacher with "
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
