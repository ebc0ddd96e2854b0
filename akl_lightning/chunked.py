"""Project hidden states onto the vocabulary and compare, a chunk of tokens at a time.

The logits of a batch, ``[tokens, vocab]``, are the largest tensor of a distillation step and are needed for a moment
only. Here they exist for one chunk: it is projected, compared, and the gradient with respect to its logits is folded at
once into the gradients of hidden states and head. What stays is of the size of the inputs, and the backward pass only
scales it. (Gradients in the forward pass, chunk by chunk: Liger-Kernel, arXiv 2410.10989.)
"""

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

Compare = Callable[[Tensor, Tensor | None, Tensor, Tensor], dict[str, Tensor]]
"""Called with student logits and teacher logits ``[rows, vocab]`` in at least float32, labels ``[rows]`` and memory to
use as it likes, ``[4, rows, vocab]``. Returns statistics ``[rows]`` by name, ``loss`` among them, and overwrites the
student's logits with the gradient of the summed loss; the teacher's may be overwritten as well."""

_LOGITS_BYTES = 2**26
"""Memory of the logits of one chunk, on each side; the products gain little from larger ones."""

_CACHE_BYTES = 2**20
"""On a CPU, a chunk is compared in blocks of rows of this size, which stay in its caches from pass to pass."""


@dataclass(frozen=True)
class Projection:
    """Logits that are yet to be computed.

    Args:
        hidden: ``[tokens, hidden]``.
        head: maps hidden states to logits. A plain ``nn.Linear`` is fastest; any other module (a LoRA adapter, say) is
            differentiated by autograd, still a chunk at a time.
        soft_cap: bound of the logits, ``soft_cap * tanh(logits / soft_cap)`` (Gemma 2), or None.
    """

    hidden: Tensor
    head: nn.Module
    soft_cap: float | None = None


Logits = Tensor | Projection
"""Ready-made logits ``[tokens, vocab]``, or the means to compute them."""


def project_and_compare(
    student: Logits, teacher: Logits | None, labels: Tensor, compare: Compare, chunk_size: int | None = None
) -> tuple[Tensor, dict[str, Tensor]]:
    """Compare student and teacher at every token without ever holding all logits.

    Where one side has more outputs than the other (padding), both are cut to the common part.

    Args:
        student: gets gradients: its hidden states and the parameters of its head, or its logits.
        teacher: gets none; may be None.
        labels: ``[tokens]``.
        compare: see :data:`Compare`.
        chunk_size: tokens of a chunk, 1 or more; None for as many as have logits of 64 MiB.

    Returns:
        The loss, a scalar, summed over tokens and differentiable once; the statistics ``[tokens]`` by name, detached.

    >>> def squares(student, teacher, labels, scratch):
    ...     loss = (student - teacher).square().sum(-1)
    ...     student.sub_(teacher).mul_(2)  # the gradient
    ...     return {"loss": loss}
    >>> student, teacher = torch.ones(5, 3, requires_grad=True), torch.zeros(5, 3)
    >>> loss, statistics = project_and_compare(student, teacher, torch.zeros(5), squares, chunk_size=2)
    >>> loss.backward()
    >>> loss.item(), statistics["loss"].tolist(), student.grad[0].tolist()
    (15.0, [3.0, 3.0, 3.0, 3.0, 3.0], [2.0, 2.0, 2.0])
    """
    sides = [_side(student)] + ([] if teacher is None else [_side(teacher)])
    inputs = sides[0].inputs
    wanted = [torch.is_grad_enabled() and tensor.requires_grad for tensor in inputs]
    names: list[str] = []

    def walk() -> tuple[Tensor, list[Tensor], list[Tensor | None]]:
        with torch.autocast(labels.device.type, enabled=False):
            statistics, gradients = _walk(sides, labels, compare, chunk_size, wanted)
        names.extend(statistics)
        return statistics["loss"].sum(), list(statistics.values()), gradients

    loss, *values = _GradientInForward.apply(walk, *inputs)
    return loss, dict(zip(names, values, strict=True))


def _walk(
    sides: list["_Side"], labels: Tensor, compare: Compare, chunk_size: int | None, wanted: list[bool]
) -> tuple[dict[str, Tensor], list[Tensor | None]]:
    tokens, width = len(labels), min(side.width for side in sides)
    chunk_size = chunk_size or max(1, _LOGITS_BYTES // (4 * max(1, width)))
    for side in sides:
        side.prepare(min(chunk_size, tokens), width, wanted if side is sides[0] else [])
    dtype = _at_least_float32(sides[0].dtype)
    rows = min(chunk_size, tokens)
    if labels.device.type == "cpu":
        rows = min(rows, max(1, _CACHE_BYTES // (width * dtype.itemsize)))
    scratch = torch.empty((4, rows, width), dtype=dtype, device=labels.device)
    parts = []
    for start in range(0, max(1, tokens), chunk_size):  # no tokens are one empty chunk: the statistics need names
        chunk = slice(start, min(start + chunk_size, tokens))
        logits = [side.project(chunk) for side in sides]
        for block in range(0, max(1, len(logits[0])), max(1, rows)):
            student, *teacher = (side[block : block + rows] for side in logits)
            parts.append(
                compare(
                    student,
                    teacher[0] if teacher else None,
                    labels[chunk][block : block + rows],
                    scratch[:, : len(student)],
                )
            )
        if any(wanted):
            sides[0].fold(chunk, logits[0])
    return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}, sides[0].gradients


class _GradientInForward(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, walk: Callable[[], Any], *inputs: Tensor) -> tuple[Tensor, ...]:
        loss, statistics, gradients = walk()
        ctx.dtypes = [tensor.dtype for tensor in inputs]
        ctx.save_for_backward(*gradients)
        ctx.mark_non_differentiable(*statistics)
        return loss, *statistics

    @staticmethod
    def backward(ctx: Any, scale: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
        # In place, which autograd notices: a second backward pass is its usual error, never a wrong gradient. A loss
        # scale (16-mixed) comes in here, before gradients are cut to the precision of the inputs.
        unscaled = scale.device.type == "cpu" and scale == 1  # elsewhere, looking would wait for the device
        return None, *(
            None if gradient is None else (gradient if unscaled else gradient.mul_(scale)).to(dtype)
            for gradient, dtype in zip(ctx.saved_tensors, ctx.dtypes, strict=True)
        )


# --------------------------------------------------------------------------------------------------------------------
# One side: ready-made logits, a linear head, or any other head


def _side(logits: Logits) -> "_Side":
    if isinstance(logits, Tensor):
        return _Dense(logits)
    head = logits.head
    if type(head) is nn.Linear and not (head._forward_hooks or head._forward_pre_hooks):
        return _Linear(logits.hidden, head.weight, head.bias, logits.soft_cap)
    return _Module(logits)


class _Side(ABC):
    """Gives logits chunk by chunk and takes back their gradients.

    ``inputs`` are the tensors that may get a gradient, ``gradients`` those in the same order, in at least float32.
    """

    inputs: tuple[Tensor, ...]
    dtype: torch.dtype
    width: int
    gradients: list[Tensor | None]

    def prepare(self, rows: int, width: int, wanted: list[bool]) -> None:
        """Get ready for chunks of at most ``rows`` tokens and logits cut to ``width``."""
        self.cut = width
        wanted = wanted or [False] * len(self.inputs)
        self.gradients = [
            torch.zeros_like(tensor, dtype=_at_least_float32(tensor.dtype)) if want else None
            for tensor, want in zip(self.inputs, wanted, strict=True)
        ]

    @abstractmethod
    def project(self, chunk: slice) -> Tensor:
        """Logits ``[rows, cut]`` in at least float32, the caller's to overwrite."""

    @abstractmethod
    def fold(self, chunk: slice, gradient: Tensor) -> None:
        """Add up the gradients of the inputs, given that of the logits ``[rows, cut]``, which may be overwritten."""


class _Dense(_Side):
    def __init__(self, logits: Tensor) -> None:
        self.inputs = (logits,)
        self.dtype = logits.dtype
        self.width = logits.shape[-1]

    def project(self, chunk: slice) -> Tensor:
        logits = self.inputs[0].detach()[chunk, : self.cut]
        return logits.to(_at_least_float32(logits.dtype), copy=True, memory_format=torch.contiguous_format)

    def fold(self, chunk: slice, gradient: Tensor) -> None:
        if (total := self.gradients[0]) is not None:
            total[chunk, : self.cut] = gradient


class _Linear(_Side):
    def __init__(self, hidden: Tensor, weight: Tensor, bias: Tensor | None, soft_cap: float | None) -> None:
        self.inputs = (hidden, weight) if bias is None else (hidden, weight, bias)
        self.width = weight.shape[0]
        self.soft_cap = soft_cap
        device = hidden.device.type
        self.dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else weight.dtype

    def prepare(self, rows: int, width: int, wanted: list[bool]) -> None:
        super().prepare(rows, width, wanted)
        # A view of the first rows, or one copy in the precision of the products; not one a chunk.
        hidden, weight, *bias = (tensor.detach().to(self.dtype) for tensor in self.inputs)
        self.hidden, self.weight, self.bias = hidden, weight[:width], bias[0][:width] if bias else None
        self.logits = self.weight.new_empty(rows, width)

    def project(self, chunk: slice) -> Tensor:
        hidden = self.hidden[chunk]
        logits = torch.mm(hidden, self.weight.T, out=self.logits[: len(hidden)])
        if self.bias is not None:
            logits += self.bias
        if self.soft_cap is not None:
            logits.div_(self.soft_cap).tanh_().mul_(self.soft_cap)
            self.capped = logits.clone()
        return logits.to(_at_least_float32(self.dtype))

    def fold(self, chunk: slice, gradient: Tensor) -> None:
        if self.soft_cap is not None:
            gradient.mul_(1 - (self.capped / self.soft_cap).square_())
        of_hidden, of_weight, *of_bias = self.gradients
        if of_bias and of_bias[0] is not None:
            of_bias[0][: self.cut] += gradient.sum(0)
        low, peak = _lower(gradient, self.dtype)
        if of_hidden is not None:
            of_hidden[chunk] = _raise(torch.mm(low, self.weight), peak)
        if of_weight is None:
            return
        if of_weight.dtype == self.dtype:
            of_weight[: self.cut].addmm_(low.T, self.hidden[chunk])
        else:
            of_weight[: self.cut] += _raise(torch.mm(low.T, self.hidden[chunk]), peak)


class _Module(_Side):
    def __init__(self, projection: Projection) -> None:
        parameters = [parameter for parameter in projection.head.parameters() if parameter.requires_grad]
        self.inputs = (projection.hidden, *parameters)
        self.head, self.soft_cap = projection.head, projection.soft_cap
        device = projection.hidden.device.type
        enabled, dtype = torch.is_autocast_enabled(device), torch.get_autocast_dtype(device)
        # As it was outside, where the head would be called; the walk is without.
        self.autocast = partial(torch.autocast, device, dtype, enabled)
        with torch.no_grad():
            probe = self.head(projection.hidden[:1])
        self.width, self.dtype = probe.shape[-1], probe.dtype

    def project(self, chunk: slice) -> Tensor:
        recorded = any(gradient is not None for gradient in self.gradients)
        with torch.set_grad_enabled(recorded), self.autocast():
            self.hidden = self.inputs[0][chunk].detach().requires_grad_(recorded)
            self.logits = self.head(self.hidden)[:, : self.cut]
            if self.soft_cap is not None:
                self.logits = torch.tanh(self.logits / self.soft_cap) * self.soft_cap
        return self.logits.detach().to(_at_least_float32(self.logits.dtype), copy=True)

    def fold(self, chunk: slice, gradient: Tensor) -> None:
        low, peak = _lower(gradient, self.logits.dtype)
        parts = torch.autograd.grad(self.logits, (self.hidden, *self.inputs[1:]), low, allow_unused=True)
        for index, (part, total) in enumerate(zip(parts, self.gradients, strict=True)):
            if part is not None and total is not None:
                (total[chunk] if index == 0 else total).add_(_raise(part, peak))


def _at_least_float32(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


def _lower(gradient: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor | None]:
    """The gradient in the precision of the products; in float16, where small numbers vanish, its largest is 1."""
    if dtype != torch.float16:
        return gradient.to(dtype), None
    peak = gradient.abs().amax().clamp(min=torch.finfo(gradient.dtype).tiny)
    return gradient.div_(peak).to(dtype), peak


def _raise(product: Tensor, peak: Tensor | None) -> Tensor:
    return product if peak is None else product.to(peak.dtype) * peak
