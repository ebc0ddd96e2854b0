"""Means over response tokens as torchmetrics: right across batches, ranks and a resume."""

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torchmetrics import Metric, MetricCollection

from akl_lightning.compat import evaluated_loaders
from akl_lightning.criterion import STATISTICS

OF_STUDENT = ("loss", "cross_entropy", "router_loss", "aligned")
"""Statistics that every token has, whether or not there is a teacher at it."""

OF_ROLLOUTS = "rollout_"
"""What is so called is of other tokens than those of the batch, at all of which there is a teacher."""


class Sums(Metric):
    """Has sums as its state, in float64, which ranks and runs that go on add up.

    Args:
        names: of the sums.
        shape: of each.
    """

    full_state_update = False

    def __init__(self, *names: str, shape: tuple[int, ...] = (), **kwargs: Any) -> None:
        super().__init__(**kwargs)
        for name in names:
            self.add_state(name, torch.zeros(shape, dtype=torch.float64), dist_reduce_fx="sum")


class TokenMean(Sums):
    """Mean of one per-token statistic over every response token seen, in float64.

    Args:
        statistic: the keyword under which :meth:`update` finds its values.

    >>> fkl = TokenMean("fkl")
    >>> fkl.update(fkl=torch.tensor([1.0, 2.0]))
    >>> fkl.update(fkl=torch.tensor([6.0]))
    >>> fkl.compute()
    tensor(3., dtype=torch.float64)
    """

    total: Tensor
    tokens: Tensor

    def __init__(self, statistic: str, **kwargs: Any) -> None:
        super().__init__("total", "tokens", **kwargs)
        self.statistic = statistic

    def update(self, **statistics: Tensor) -> None:
        """Add the values ``[tokens]`` of one batch; a batch without this statistic adds nothing.

        Of a batch with ``aligned`` (1 or 0, ``[tokens]``), what compares with a teacher counts where that is 1 alone.
        """
        if self.statistic in statistics:
            values = statistics[self.statistic].double()
            everywhere = self.statistic in OF_STUDENT or self.statistic.startswith(OF_ROLLOUTS)
            aligned = None if everywhere else statistics.get("aligned")
            self.total = self.total + _sum(values, aligned)
            self.tokens = self.tokens + _count(values, aligned)

    def compute(self) -> Tensor:
        """The mean, a scalar; NaN where no token was seen."""
        return self.total / self.tokens


class HeadTailError(Sums):
    """Mean head gap and mean tail gap per response token: how far the student is off, in head and in tail.

    See :func:`akl_lightning.functional.head_tail_gap`. Source: arXiv 2404.02657.

    >>> error = HeadTailError()
    >>> error.update(head_gap=torch.tensor([0.5, 0.25]), tail_gap=torch.tensor([0.25, 0.0]))
    >>> {name: round(value.item(), 4) for name, value in error.compute().items()}
    {'head_error': 0.375, 'tail_error': 0.125}
    """

    head: Tensor
    tail: Tensor
    tokens: Tensor

    def __init__(self, **kwargs: Any) -> None:
        super().__init__("head", "tail", "tokens", **kwargs)

    def update(
        self, head_gap: Tensor | None = None, tail_gap: Tensor | None = None, aligned: Tensor | None = None
    ) -> None:
        """Add the gaps ``[tokens]`` of one batch; a batch without a teacher has none and adds nothing.

        With ``aligned`` (1 or 0, ``[tokens]``) those count where it is 1.
        """
        if head_gap is not None and tail_gap is not None:
            self.head = self.head + _sum(head_gap.double(), aligned)
            self.tail = self.tail + _sum(tail_gap.double(), aligned)
            self.tokens = self.tokens + _count(head_gap, aligned)

    def compute(self) -> dict[str, Tensor]:
        """``head_error`` and ``tail_error``, scalars between 0 and 2; NaN where no token was seen."""
        return {"head_error": self.head / self.tokens, "tail_error": self.tail / self.tokens}


class TurnErrors(Sums):
    """Mean head gap and mean tail gap of the tokens of each assistant turn, over all conversations.

    The last of the turns that are told apart holds all later ones too.

    Args:
        turns: how many are told apart.

    >>> errors = TurnErrors(turns=2)
    >>> gaps = torch.tensor([0.5, 0.25, 1.0, 0.0])
    >>> errors.update(head_gap=gaps, tail_gap=2 * gaps, turn=torch.tensor([0, 0, 1, 3]))
    >>> {name: value.item() for name, value in errors.compute().items() if "head" in name}
    {'turn_1/head_error': 0.375, 'turn_2_on/head_error': 0.5}
    """

    head: Tensor
    tail: Tensor
    tokens: Tensor

    def __init__(self, turns: int = 8, **kwargs: Any) -> None:
        super().__init__("head", "tail", "tokens", shape=(turns,), **kwargs)
        self.turns = turns

    def update(
        self,
        head_gap: Tensor | None = None,
        tail_gap: Tensor | None = None,
        turn: Tensor | None = None,
        aligned: Tensor | None = None,
    ) -> None:
        """Add the gaps ``[tokens]`` of one batch; ``turn`` ``[tokens]`` numbers the turns from 0.

        Of a teacher with another tokenizer, those of ``aligned`` tokens alone.

        A batch without a teacher, or that knows no turns, adds nothing.
        """
        if head_gap is not None and tail_gap is not None and turn is not None:
            if aligned is not None:
                turn = turn.masked_fill(aligned == 0, -1)
            # A row for each turn, not index_add, which on a GPU adds up in another order every time.
            of_turn = turn.clamp(max=self.turns - 1) == torch.arange(self.turns, device=turn.device)[:, None]
            self.head = self.head + torch.where(of_turn, head_gap.double(), 0.0).sum(1)
            self.tail = self.tail + torch.where(of_turn, tail_gap.double(), 0.0).sum(1)
            self.tokens = self.tokens + of_turn.sum(1)

    def compute(self) -> dict[str, Tensor]:
        """``turn_1/head_error``, ``turn_1/tail_error`` and so on, scalars; nothing of first turns alone."""
        seen = [number for number, count in enumerate(self.tokens.tolist()) if count]
        if not any(seen):
            return {}
        names = {number: f"turn_{number + 1}" + "_on" * (number == self.turns - 1) for number in seen}
        gaps = {"head_error": self.head, "tail_error": self.tail}
        return {f"{names[n]}/{name}": gap[n] / self.tokens[n] for n in seen for name, gap in gaps.items()}


class BitsPerByte(Sums):
    """Cross entropy per byte of text, in bits, which can be compared over tokenizers; in float64.

    >>> bits = BitsPerByte()
    >>> bits.update(cross_entropy=torch.tensor([2.0, 4.0]).log(), bytes=torch.tensor([3, 0]))
    >>> {name: round(value.item(), 4) for name, value in bits.compute().items()}
    {'bits_per_byte': 1.0}
    """

    nats: Tensor
    bytes: Tensor

    def __init__(self, **kwargs: Any) -> None:
        super().__init__("nats", "bytes", **kwargs)

    def update(self, cross_entropy: Tensor | None = None, bytes: Tensor | None = None) -> None:
        """Add the cross entropies and the lengths in bytes of a batch's tokens, each ``[tokens]``.

        A token that says nothing, such as the last one, has a cross entropy and no length. A batch whose tokenizer does
        not tell the bytes of its tokens adds nothing.
        """
        if cross_entropy is not None and bytes is not None:
            self.nats = self.nats + cross_entropy.double().sum()
            self.bytes = self.bytes + bytes.double().sum()

    def compute(self) -> dict[str, Tensor]:
        """``bits_per_byte``, a scalar, or nothing where no byte was seen."""
        return {"bits_per_byte": self.nats / (math.log(2) * self.bytes)} if self.bytes else {}


class AlignedShare(TokenMean):
    """Share of the tokens at which a teacher with another tokenizer stands at the same byte.

    Args:
        statistic: the keyword under which :meth:`update` finds 1 or 0 for each token, and the name of the share.

    >>> share = AlignedShare()
    >>> share.update(aligned=torch.tensor([1.0, 0.0]))
    >>> share.compute()
    {'aligned': tensor(0.5000, dtype=torch.float64)}
    """

    def __init__(self, statistic: str = "aligned", **kwargs: Any) -> None:
        super().__init__(statistic, **kwargs)

    def update(self, **statistics: Tensor) -> None:
        """Add those of one batch, ``[tokens]``; of one with rollouts its other tokens, under ``data_aligned``."""
        of_data = statistics.get(f"data_{self.statistic}")
        super().update(**statistics if of_data is None else {self.statistic: of_data})

    def compute(self) -> dict[str, Tensor]:  # type: ignore[override]
        """The share by its name, a scalar, or nothing where teacher and student share one tokenizer."""
        return {self.statistic: super().compute()} if self.tokens else {}


def _sum(values: Tensor, aligned: Tensor | None) -> Tensor:
    return (values if aligned is None else torch.where(aligned > 0, values, 0)).sum()


def _count(values: Tensor, aligned: Tensor | None) -> int | Tensor:
    return values.numel() if aligned is None else aligned.double().sum()


def distillation_metrics(prefix: str, with_teacher: bool, with_router: bool = False) -> MetricCollection:
    """What is logged once an epoch under ``prefix``, fed with the statistics of the criterion.

    Args:
        prefix: ``train/``, ``val/`` or ``test/``.
        with_teacher: without one, only loss and cross entropy exist.
        with_router: whether a mixture of experts has a loss of its router's.
    """
    metrics: dict[str, Metric | MetricCollection] = {
        name: TokenMean(name)
        for name in STATISTICS
        if name not in ("head_gap", "tail_gap") and (with_teacher or name in ("loss", "cross_entropy"))
    }
    metrics["bits_per_byte"] = BitsPerByte()
    if with_teacher:
        metrics["head_tail"] = HeadTailError()
        if prefix != "train/":
            metrics["turns"] = TurnErrors()
        metrics["aligned"] = AlignedShare()
    if with_router:
        metrics["router_loss"] = TokenMean("router_loss")
    return MetricCollection(metrics, prefix=prefix, compute_groups=False)


def add_metrics(module: Any, with_teacher: bool, with_router: bool) -> None:
    """Give a module ``train_metrics``, ``val_metrics`` and ``test_metrics``, and a place for those of further sets."""
    for stage in ("train", "val", "test"):
        module.add_module(f"{stage}_metrics", distillation_metrics(f"{stage}/", with_teacher, with_router))
    module.further_metrics = nn.ModuleDict({stage: nn.ModuleList() for stage in ("val", "test")})


def names_of_sets(loaders: Any) -> list[str]:
    """What several sets of samples are called that are evaluated one after another: by key, or by number from 0.

    >>> names_of_sets({"news": [1], "code": [2]}), names_of_sets([[1], [2]]), names_of_sets([[1]])
    (['news', 'code'], ['0', '1'], [])
    """
    if not isinstance(loaders, Mapping | list | tuple) or len(loaders) < 2:
        return []
    return [str(name) for name in (loaders if isinstance(loaders, Mapping) else range(len(loaders)))]


def metrics_of_set(module: Any, stage: str, number: int) -> MetricCollection:
    """Those of one of the sets of samples that a stage evaluates one after another; made when it is first met.

    Args:
        module: has those of the first as ``val_metrics`` and ``test_metrics``, those of others in ``further_metrics``.
        stage: ``val`` or ``test``.
        number: of the set, from 0.
    """
    first, further = getattr(module, f"{stage}_metrics"), module.further_metrics[stage]
    while len(further) < number:
        further.append(first.clone())
        further[-1].reset()
    return further[number - 1] if number else first


def log_sets(module: Any, stage: str) -> None:
    """Log each of several sets of samples under its name, and the first as if it were alone."""
    names = names_of_sets(evaluated_loaders(module.trainer))
    for number, name in enumerate(names or [""]):
        means = log_means(module, metrics_of_set(module, stage, number), log=number == 0)
        if names:
            module.log_dict({f"{stage}/{name}/{key.removeprefix(f'{stage}/')}": mean for key, mean in means.items()})


def log_means(module: Any, metrics: MetricCollection, log: bool = True) -> dict[str, Tensor]:
    """The means so far, logged by the module unless it is said otherwise; then the metrics begin anew."""
    means = {name: mean.float() for name, mean in metrics.compute().items()}
    if log:
        module.log_dict(means)
    metrics.reset()
    return means
