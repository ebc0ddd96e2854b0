"""Vocabularies that differ are compared in classes, into which the outputs of both are merged.

A class's logit is the logsumexp of its outputs' logits, so that its probability is the sum of theirs. With ``u`` the
student's merged logits, the gradient goes back to a logit ``z`` of class ``c`` as ``exp(z - u[c])`` times that of
``u[c]``. Cross entropy is that of the student's own outputs.

Nearly all classes of two tokenizers are one output of each. So the columns of a chunk are arranged before anything is
computed: first the outputs that are alone in their class on both sides, in the same order on both; then one output of
each other class, where the class's own logit is put; behind them the other outputs. What is alone is never touched, and
nothing is as wide as the vocabulary but the logits themselves.
"""

from collections.abc import Callable
from dataclasses import dataclass, field, fields, replace
from typing import NamedTuple

import torch
from torch import Tensor

from akl_lightning import functional as F
from akl_lightning import kernels
from akl_lightning.errors import UsageError
from akl_lightning.kernels import triton_classes
from akl_lightning.kernels.pairs import Comparison, per_row

FLOOR = 30.0
"""A class that one side has no output for is there as likely as exp(-30) times the side's likeliest output, and no
gradient goes there: the other side's mass on it costs, but never without bound."""


class Bucket(NamedTuple):
    """Classes of about as many outputs."""

    columns: Tensor
    """Of their outputs, ``[width, classes]``, counted from those behind the ones that are alone."""

    none: Tensor
    """Where a class has no more, ``[width, classes]``."""

    classes: Tensor
    """``[classes]``, counted likewise."""


@dataclass(frozen=True)
class Columns:
    """How the outputs of one side are arranged; ``alone`` columns are classes of one output on both sides.

    Args:
        order: which output stands in each column, ``[columns]``; any in that of a class without outputs.
        place: in which column each output stands, ``[outputs]``.
        of_output: which class each output belongs to, as the column of its logit, ``[outputs]``.
        of_column: the same of the columns behind those ``alone``, counted from these, ``[columns - alone]``.
        empty: the classes without outputs, counted likewise.
        buckets: classes of more than one output, those of about as many together.
        groups: the same for the Triton kernel.
    """

    order: Tensor
    place: Tensor
    of_output: Tensor
    of_column: Tensor
    empty: Tensor
    buckets: tuple[Bucket, ...]
    groups: triton_classes.Groups

    def to(self, device: torch.device) -> "Columns":
        """The same elsewhere."""
        moved = {f.name: getattr(self, f.name).to(device) for f in fields(self) if f.name not in ("buckets", "groups")}
        buckets = tuple(Bucket(*(tensor.to(device) for tensor in bucket)) for bucket in self.buckets)
        groups = triton_classes.Groups(*(tensor.to(device) for tensor in self.groups))
        return replace(self, **moved, buckets=buckets, groups=groups)


@dataclass(frozen=True, init=False)
class Classes:
    """Which outputs of two vocabularies are compared as one.

    Args:
        student: the class of each of the student's outputs, ``[outputs]``, int64; padding belongs to one, too.
        teacher: likewise of the teacher's.
        count: how many classes there are. One that only one side has outputs for has a floor on the other, see
            :data:`FLOOR`; one that neither has is left out.

    Raises:
        UsageError: classes out of their range, or of another kind or shape.

    >>> classes = Classes(student=torch.tensor([0, 1, 1, 2]), teacher=torch.tensor([2, 0, 1]), count=3)
    >>> classes.alone, classes.width
    (2, 3)
    """

    alone: int
    """Classes of one output on both sides: as many columns, the first ones."""

    width: int
    """Columns that are compared, one a class."""

    numbers: Tensor
    """Which class each of them is, ``[width]``."""

    count: int
    student: Columns = field(repr=False)
    teacher: Columns = field(repr=False)

    def __init__(self, student: Tensor, teacher: Tensor, count: int) -> None:
        for name, side in (("student", student), ("teacher", teacher)):
            if side.dim() != 1 or side.dtype != torch.int64 or not len(side):
                raise UsageError(f"classes of the {name} {list(side.shape)} of {side.dtype}: give one int64 an output.")
            if side.min() < 0 or side.max() >= count:
                raise UsageError(
                    f"classes of the {name} go from {side.min()} to {side.max()}: give each output one of 0 to "
                    f"{count - 1}."
                )
        device, student, teacher = student.device, student.cpu(), teacher.cpu()
        sizes = [side.bincount(minlength=count) for side in (student, teacher)]
        single = (sizes[0] == 1) & (sizes[1] == 1)
        # In the student's order, whose logits are the ones that are written back.
        alone = student[single[student]]
        others = (~single & (sizes[0] + sizes[1] > 0)).nonzero().squeeze(-1)
        values = {
            "alone": len(alone), "width": len(alone) + len(others), "numbers": torch.cat([alone, others]).to(device),
            "count": count, "student": _arranged(student, alone, others, count).to(device),
            "teacher": _arranged(teacher, alone, others, count).to(device),
        }  # fmt: skip
        for name, value in values.items():
            object.__setattr__(self, name, value)

    def to(self, device: torch.device | str) -> "Classes":
        """The same elsewhere; itself where it is there already."""
        device = torch.device(device)
        if self.numbers.device == device or (device.index is None and self.numbers.device.type == device.type):
            return self
        moved = object.__new__(Classes)
        for name, value in vars(self).items():
            object.__setattr__(moved, name, value if isinstance(value, int) else value.to(device))
        return moved

    def by_number(self, merged: Tensor) -> Tensor:
        """Columns that were compared in the order of the classes' numbers: ``[rows, count]``, 0 where there is none."""
        return merged.new_zeros(len(merged), self.count).index_copy_(1, self.numbers, merged)


def _arranged(side: Tensor, alone: Tensor, others: Tensor, count: int) -> Columns:
    outputs, singles = len(side), len(alone)
    by_class = side.argsort(stable=True)
    sizes = side.bincount(minlength=count)
    starts = sizes.cumsum(0) - sizes
    sizes, starts = sizes[others], starts[others]
    # Of an empty class any output: its logit is never looked at.
    first = by_class[starts.clamp(max=outputs - 1)]
    more = (sizes - 1).clamp(min=0)
    of_more = torch.arange(len(others)).repeat_interleave(more)
    begin = more.cumsum(0) - more
    rest = by_class[starts[of_more] + 1 + torch.arange(len(of_more)) - begin[of_more]]
    where = torch.empty(count, dtype=torch.long)
    where[side[by_class]] = by_class  # right where there is one alone
    order = torch.cat([where[alone], first, rest])
    place, columns = torch.empty(outputs, dtype=torch.long), torch.arange(len(order))
    real = torch.cat([torch.ones(singles, dtype=torch.bool), sizes > 0, torch.ones(len(rest), dtype=torch.bool)])
    place[order[real]] = columns[real]
    of_column = torch.cat([torch.arange(len(others)), of_more])
    of_output, behind = place.clone(), place >= singles
    of_output[behind] = singles + of_column[place[behind] - singles]
    buckets, width = list[Bucket](), 2
    while len(more) and width // 2 <= more.max():
        classes = ((sizes > width // 2) & (sizes <= width)).nonzero().squeeze(-1)
        if len(classes):
            step = torch.arange(width)[:, None]
            table = torch.where(step == 0, classes, len(others) + begin[classes] + step - 1)
            none = step >= sizes[classes]
            buckets.append(Bucket(table.masked_fill(none, 0), none, classes))
        width *= 2
    groups = triton_classes.groups(len(others) + begin, more)
    empty = (sizes == 0).nonzero().squeeze(-1)
    return Columns(order, place, of_output, of_column, empty, tuple(buckets), groups)


# --------------------------------------------------------------------------------------------------------------------
# The comparison of a chunk


def merge(logits: Tensor, columns: Columns, classes: Classes, temperature: float, wanted: bool) -> Tensor | None:
    """Put each class's logit, at the temperature, in its column.

    Args:
        logits: ``[rows, columns]``, arranged; overwritten.
        columns: of this side.
        classes: of both.
        temperature: what is merged are softened probabilities, so that a logit is ``t * logsumexp(z / t)``.
        wanted: whether the shares are.

    Returns:
        What share of its class's probability the output of each column behind the first ``alone`` has.
    """
    rest, count = logits[:, classes.alone :], classes.width - classes.alone
    if not rest.shape[1]:
        return torch.empty_like(rest) if wanted else None
    least = logits.amax(-1, keepdim=True) - FLOOR * temperature if len(columns.empty) else None
    if triton_classes.supports(logits):
        shares = triton_classes.merge(rest, columns.groups, count, temperature, wanted)
        if least is not None:
            rest.index_copy_(1, columns.empty, least.expand(-1, len(columns.empty)))
    else:
        merged = rest[:, :count].clone()
        for table, none, of_size in columns.buckets:
            outputs = take(rest, table.flatten()).view(len(rest), *table.shape).masked_fill_(none, -torch.inf)
            merged.index_copy_(1, of_size, outputs.div_(temperature).logsumexp(1).mul_(temperature))
        if least is not None:
            merged.index_copy_(1, columns.empty, least.expand(-1, len(columns.empty)))
        shares = None
        if wanted:
            shares = torch.sub(rest, take(merged, columns.of_column)).div_(temperature).exp_()
            shares.masked_fill_(rest == -torch.inf, 0.0)
        rest[:, :count] = merged
    if shares is not None and least is not None:
        shares.index_fill_(1, columns.empty, 0.0)
    return shares


@torch.no_grad()
def compare(
    student: Tensor,
    teacher: Tensor,
    labels: Tensor,
    how: Comparison,
    classes: Classes,
    gradient: Tensor | None = None,
    pairwise: Callable[..., dict[str, Tensor]] = kernels.compare,
) -> dict[str, Tensor]:
    """As :func:`akl_lightning.kernels.compare`, with the divergence and its statistics those of the merged classes.

    Args:
        student: logits ``[rows, columns]``, arranged as ``classes.student`` says; overwritten.
        teacher: likewise, as ``classes.teacher`` says.
        labels: outputs of the student, ``[rows]``.
        how: what is compared; both distributions are softened before they are merged.
        classes: what is merged.
        gradient: gets the gradient with respect to ``student``; may be it.
        pairwise: compares what is merged.
    """
    label = Label(classes.student.place[labels], classes.student.of_output[labels])
    compare_rows = _compare if how.temperature == 1 else _compare_softened
    return compare_rows(student, teacher.to(student.dtype), label, how, classes, gradient, pairwise)


class Label(NamedTuple):
    """Where the labels stand, ``[rows]`` each."""

    column: Tensor
    of_class: Tensor


def _compare(
    student: Tensor,
    teacher: Tensor,
    label: Label,
    how: Comparison,
    classes: Classes,
    gradient: Tensor | None,
    pairwise: Callable[..., dict[str, Tensor]],
) -> dict[str, Tensor]:
    """Cross entropy is that of the label's class, which comes with the divergence, and that of the label within it."""
    at_label = _at(student, label.column)
    shares = merge(student, classes.student, classes, 1.0, gradient is not None)
    merge(teacher, classes.teacher, classes, 1.0, False)
    in_class = _at(student, label.of_class)
    # A class of one output has nothing to add, nor one that is masked and infinite already.
    within = (in_class - at_label).masked_fill_((in_class == at_label) | (in_class == -torch.inf), 0.0)
    into = None if gradient is None else gradient[:, : classes.width]
    part = pairwise(student[:, : classes.width], teacher[:, : classes.width], label.of_class, how, into)
    weight = (1 - per_row(how.alpha, student)).to(within.dtype)
    if gradient is not None and shares is not None:
        _spread(gradient, shares, label, weight, classes)
    loss, cross_entropy = part["loss"] + F.weighted(weight, within), part["cross_entropy"] + within
    return {**part, "loss": loss, "cross_entropy": cross_entropy}


def _compare_softened(
    student: Tensor,
    teacher: Tensor,
    label: Label,
    how: Comparison,
    classes: Classes,
    gradient: Tensor | None,
    pairwise: Callable[..., dict[str, Tensor]],
) -> dict[str, Tensor]:
    """Cross entropy is not softened: it is that of the logits as they were, which costs a copy of them."""
    own = student.clone()
    own[:, classes.alone :].index_fill_(1, classes.student.empty, -torch.inf)
    alone = kernels.compare(own, None, label.column, how, None if gradient is None else own)
    shares = merge(student, classes.student, classes, how.temperature, gradient is not None)
    merge(teacher, classes.teacher, classes, how.temperature, False)
    merged = student[:, : classes.width]
    into = None if gradient is None else merged  # in the precision of the logits: cross entropy's is still to come
    part = pairwise(merged, teacher[:, : classes.width], label.of_class, how._replace(alpha=1.0), into)
    weight = per_row(how.alpha, student).to(student.dtype)
    if gradient is not None and shares is not None:
        merged.mul_(weight[:, None]).masked_fill_((weight == 0)[:, None], 0.0)
        _spread(student, shares, label, torch.zeros_like(weight), classes)
        gradient.copy_(own.add_(student))
    loss = F.weighted(weight, part["divergence"]) + alone["loss"]
    return {**part, "loss": loss, "cross_entropy": alone["cross_entropy"]}


def _spread(gradient: Tensor, shares: Tensor, label: Label, weight: Tensor, classes: Classes) -> None:
    """Hand the gradient of classes on to their outputs, in place.

    Of cross entropy's, with this weight ``[rows]``, what was taken off at the label's class is taken off at the label.
    """
    alone, columns = classes.alone, classes.student
    if not shares.shape[1]:
        return
    of_class, at_label = ((place - alone).clamp(min=0)[:, None] for place in (label.of_class, label.column))
    weight = torch.where(label.of_class < alone, 0.0, weight)[:, None]
    slopes = gradient[:, alone : classes.width].to(shares.dtype, copy=True)
    slopes.scatter_(1, of_class, slopes.gather(1, of_class) + weight)
    if triton_classes.supports(shares):
        triton_classes.spread(slopes, shares, columns.of_column, gradient[:, alone:], at_label, weight)
        return
    result = take(slopes, columns.of_column).mul_(shares)
    result.scatter_(1, at_label, result.gather(1, at_label) - weight)
    gradient[:, alone:] = result


def _at(logits: Tensor, column: Tensor) -> Tensor:
    at_label = logits.gather(1, column[:, None]).squeeze(-1)
    return at_label.masked_fill_(at_label <= F.LOWEST, -torch.inf)


def take(tensor: Tensor, index: Tensor) -> Tensor:
    """These columns of every row; ``gather`` is the fastest way to it."""
    return tensor.gather(1, index.expand(len(tensor), -1))
