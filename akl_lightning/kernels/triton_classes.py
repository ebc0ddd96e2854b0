"""Merging outputs into classes, and the way back of the gradient, as Triton kernels.

With ``z`` the logits of a class's outputs, its own is ``u = t log Σ exp(z / t)``, at most the largest and the logarithm
of a sum that is 1 or more, and what an output has of it is ``exp((z - u) / t)``. A lane walks over the outputs of one
class, of which neighbouring lanes have about as many; a class of many outputs has a program to itself. Each column is
written by the lane that has read it, so nothing is atomic and the same bits come out again.
"""

# mypy: disable-error-code="no-untyped-def"
from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from akl_lightning.kernels.triton import supports as supports_logits
from akl_lightning.kernels.triton_common import jit, tl

_MANY = 32
_LANES, _BLOCK = 128, 1024


class Groups(NamedTuple):
    """The classes of one side for the kernel, int32; columns are counted from the first that is not alone."""

    begin: Tensor
    """The second output's column of each class, the others behind it; the first stands in the class's own column."""

    more: Tensor
    """How many there are behind the first."""

    few: Tensor
    """Classes of up to 32 more, those of about as many beside each other."""

    many: Tensor
    """The other classes."""


def groups(begin: Tensor, more: Tensor) -> Groups:
    """See :class:`Groups`; ``[classes]`` each."""
    order = more.argsort(stable=True)
    few = int((more <= _MANY).sum())
    return Groups(*(tensor.to(torch.int32) for tensor in (begin, more, order[:few], order[few:])))


def supports(logits: Tensor) -> bool:
    """Whether the kernels take logits like these."""
    return logits.dtype == torch.float32 and supports_logits(logits, None)


def merge(logits: Tensor, classes: Groups, count: int, temperature: float, wanted: bool) -> Tensor | None:
    """Put the logit of each class in its column.

    Args:
        logits: ``[rows, columns]`` behind those that are alone; the first ``count`` are overwritten.
        classes: their outputs.
        count: how many classes there are.
        temperature: softens.
        wanted: whether shares are.

    Returns:
        The share that each output has of its class's probability, ``[rows, columns]``.
    """
    shares = torch.empty(logits.shape, device=logits.device) if wanted else None
    blocks = -(-len(classes.few) // _LANES)
    if len(logits) and count:
        into = logits if shares is None else shares
        _merge[(len(logits), blocks + len(classes.many))](
            logits, into, *classes, logits.stride(0), into.stride(0), len(classes.few), blocks, temperature,
            SHARES=wanted, LANES=_LANES, BLOCK=_BLOCK, num_warps=4,
        )  # fmt: skip
    return shares


def spread(
    slopes: Tensor, shares: Tensor, of_column: Tensor, gradient: Tensor, at_label: Tensor, weight: Tensor
) -> None:
    """Fill ``gradient``: to each column that of its class, by its share, less ``weight`` at the label.

    Args:
        slopes: ``[rows, classes]``.
        shares: ``[rows, columns]``.
        of_column: the class of each column, ``[columns]``.
        gradient: ``[rows, columns]``, in any precision.
        at_label: the label's column, ``[rows, 1]``.
        weight: ``[rows, 1]``; 0 where the label is not among these columns.
    """
    rows, columns = shares.shape
    if rows and columns:
        _spread[(rows, -(-columns // _BLOCK))](
            slopes, shares, of_column, gradient, at_label, weight.contiguous(), columns,
            slopes.stride(0), shares.stride(0), gradient.stride(0), BLOCK=_BLOCK, num_warps=4,
        )  # fmt: skip


@jit
def _few_of_each(
    Z, SHARES_OUT, BEGIN, MORE, FEW, at, count, c, temperature, SHARES: tl.constexpr, LANES: tl.constexpr
):  # fmt: skip
    lane = at + tl.arange(0, LANES)
    real = lane < count
    own = tl.load(FEW + lane, mask=real, other=0)
    begin = tl.load(BEGIN + own, mask=real, other=0)
    more = tl.load(MORE + own, mask=real, other=0)
    most = tl.max(more, 0)
    first = tl.load(Z + own, mask=real, other=0.0)
    top = first
    for i in range(0, most):
        top = tl.maximum(top, tl.load(Z + begin + i, mask=i < more, other=float("-inf")))
    # Where all are masked nothing is to be subtracted from minus infinity.
    ref = tl.where(top == float("-inf"), 0.0, top)
    total = tl.exp2((first - ref) * c)
    for i in range(0, most):
        total += tl.exp2((tl.load(Z + begin + i, mask=i < more, other=float("-inf")) - ref) * c)
    if SHARES:
        per = tl.where(total > 0, 1 / total, 0.0)
        tl.store(SHARES_OUT + own, tl.exp2((first - ref) * c) * per, mask=real)
        for i in range(0, most):
            z = tl.load(Z + begin + i, mask=i < more, other=float("-inf"))
            tl.store(SHARES_OUT + begin + i, tl.exp2((z - ref) * c) * per, mask=i < more)
    tl.store(Z + own, tl.where(more > 0, ref + tl.log(total) * temperature, first), mask=real)


@jit
def _many_of_one(Z, SHARES_OUT, BEGIN, MORE, MANY, at, c, temperature, SHARES: tl.constexpr, BLOCK: tl.constexpr):
    own = tl.load(MANY + at)
    begin = tl.load(BEGIN + own)
    more = tl.load(MORE + own)
    first = tl.load(Z + own)
    lane = tl.arange(0, BLOCK)
    tops = tl.zeros([BLOCK], tl.float32) + first
    for start in range(0, more, BLOCK):
        tops = tl.maximum(tops, tl.load(Z + begin + start + lane, mask=start + lane < more, other=float("-inf")))
    top = tl.max(tops, 0)
    ref = tl.where(top == float("-inf"), 0.0, top)
    totals = tl.where(lane == 0, tl.exp2((first - ref) * c), 0.0)
    for start in range(0, more, BLOCK):
        z = tl.load(Z + begin + start + lane, mask=start + lane < more, other=float("-inf"))
        totals += tl.exp2((z - ref) * c)
    total = tl.sum(totals, 0)
    if SHARES:
        per = tl.where(total > 0, 1 / total, 0.0)
        tl.store(SHARES_OUT + own, tl.exp2((first - ref) * c) * per)
        for start in range(0, more, BLOCK):
            z = tl.load(Z + begin + start + lane, mask=start + lane < more, other=float("-inf"))
            tl.store(SHARES_OUT + begin + start + lane, tl.exp2((z - ref) * c) * per, mask=start + lane < more)
    tl.store(Z + own, ref + tl.log(total) * temperature)


@jit(do_not_specialize=["count", "blocks"])
def _merge(
    Z, SHARES_OUT, BEGIN, MORE, FEW, MANY, z_stride, shares_stride, count, blocks, temperature,
    SHARES: tl.constexpr, LANES: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    part = tl.program_id(1)
    Z += row * z_stride
    SHARES_OUT += row * shares_stride
    c = 1.4426950408889634 / temperature
    if part < blocks:
        _few_of_each(Z, SHARES_OUT, BEGIN, MORE, FEW, part * LANES, count, c, temperature, SHARES, LANES)
    else:
        _many_of_one(Z, SHARES_OUT, BEGIN, MORE, MANY, part - blocks, c, temperature, SHARES, BLOCK)


@jit(do_not_specialize=["columns"])
def _spread(
    SLOPES, SHARES, OF_COLUMN, G, AT_LABEL, WEIGHT, columns, slopes_stride, shares_stride, g_stride,
    BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    real = at < columns
    label = tl.load(AT_LABEL + row)
    weight = tl.load(WEIGHT + row)
    own = tl.load(OF_COLUMN + at, mask=real, other=0)
    slope = tl.load(SLOPES + row * slopes_stride + own, mask=real, other=0.0)
    share = tl.load(SHARES + row * shares_stride + at, mask=real, other=0.0)
    g = slope * share - tl.where(at == label, weight, 0.0)
    tl.store(G + row * g_stride + at, g.to(G.dtype.element_ty), mask=real)
