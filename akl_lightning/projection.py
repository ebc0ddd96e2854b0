"""Project hidden states onto the vocabulary and compare, a chunk of tokens at a time.

The logits of a batch, ``[tokens, vocab]``, are the largest tensor of a distillation step and are needed for a moment
only. Here they exist for one chunk: it is projected, compared, and the gradient with respect to its logits is folded at
once into the gradients of hidden states and head. What stays is of the size of the inputs, and the backward pass only
scales it. (Gradients in the forward pass, chunk by chunk: Liger-Kernel, arXiv 2410.10989.)
"""

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.distributed.fsdp import FSDPModule

from akl_lightning.compat import has_forward_hooks
from akl_lightning.errors import UsageError

ChunkLoss = Callable[[Tensor, Tensor | None, Tensor, Tensor, bool], dict[str, Tensor]]
"""Called with student logits and teacher logits ``[rows, vocab]`` in at least float32, labels ``[rows]``, memory to use
as it likes ``[4, rows, vocab]``, and whether a gradient is wanted. Returns statistics ``[rows]`` by name, ``loss``
among them, and overwrites the student's logits with the gradient of the summed loss; it may overwrite the teacher's."""

_LOGITS_BYTES = 2**26
"""Memory of the logits of one chunk, on each side; the products gain little from larger ones."""

_CACHE_BYTES = 2**21
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

    def logits(self) -> Tensor:
        """All of them, ``[tokens, vocab]``."""
        logits = self.head(self.hidden)
        return logits if self.soft_cap is None else torch.tanh(logits / self.soft_cap) * self.soft_cap


@dataclass(frozen=True)
class TopLogProbs:
    """A teacher of whom only the likeliest tokens are known, and the mass of all others.

    The others are one bucket: any comparison that sums ``p f(q / p)`` over tokens has the value and the gradient that
    it has with all of them merged into one token. To that end their mass is spread as the student's is.

    Args:
        log_probs: ``[tokens, k]``.
        tokens: which tokens of the vocabulary these are, ``[tokens, k]``, int64.
        rest: log of the mass of all others, ``[tokens, 1]``.
        vocab_size: outputs of the teacher.
    """

    log_probs: Tensor
    tokens: Tensor
    rest: Tensor
    vocab_size: int


Logits = Tensor | Projection | TopLogProbs
"""Ready-made logits ``[tokens, vocab]``, or the means to compute them."""


def rows_of(logits: Logits, tokens: slice) -> Logits:
    """Those of some tokens alone."""
    if isinstance(logits, Tensor):
        return logits[tokens]
    if isinstance(logits, Projection):
        return replace(logits, hidden=logits.hidden[tokens])
    parts = {name: getattr(logits, name)[tokens] for name in ("log_probs", "tokens", "rest")}
    return replace(logits, **parts)


def project_and_compare(
    student: Logits, teacher: Logits | None, labels: Tensor, chunk_loss: ChunkLoss, chunk_size: int | None = None
) -> tuple[Tensor, dict[str, Tensor]]:
    """Compare student and teacher at every token without ever holding all logits.

    Where one side has more outputs than the other (padding), both are cut to the common part.

    Args:
        student: gets gradients: its hidden states and the parameters of its head, or its logits.
        teacher: gets none; may be None.
        labels: ``[tokens]``.
        chunk_loss: see :data:`ChunkLoss`.
        chunk_size: tokens of a chunk, 1 or more; None for as many as have logits of 64 MiB.

    Returns:
        The loss, a scalar, summed over tokens and differentiable once; the statistics ``[tokens]`` by name, detached.

    Raises:
        UsageError: a head that FSDP shards as a unit of its own.

    >>> def squares(student, teacher, labels, scratch, with_gradient):
    ...     loss = (student - teacher).square().sum(-1)
    ...     student.sub_(teacher).mul_(2)  # the gradient
    ...     return {"loss": loss}
    >>> student, teacher = torch.ones(5, 3, requires_grad=True), torch.zeros(5, 3)
    >>> loss, statistics = project_and_compare(student, teacher, torch.zeros(5), squares, chunk_size=2)
    >>> loss.backward()
    >>> loss.item(), statistics["loss"].tolist(), student.grad[0].tolist()
    (15.0, [3.0, 3.0, 3.0, 3.0, 3.0], [2.0, 2.0, 2.0])
    """
    side = _side(student, with_gradient=torch.is_grad_enabled())
    other = None if teacher is None else _side(teacher, with_gradient=False)
    names: list[str] = []

    def walk() -> tuple[Tensor, list[Tensor], list[Tensor | None]]:
        with torch.autocast(labels.device.type, enabled=False):
            statistics = _walk(side, other, labels, chunk_loss, chunk_size)
        names.extend(statistics)
        return statistics["loss"].sum(), list(statistics.values()), side.gradients

    loss, *values = _GradientInForward.apply(walk, *side.inputs)
    return loss, dict(zip(names, values, strict=True))


def _walk(
    student: "_Side", teacher: "_Side | None", labels: Tensor, chunk_loss: ChunkLoss, chunk_size: int | None
) -> dict[str, Tensor]:
    tokens, width = len(labels), min(side.width for side in (student, teacher) if side is not None)
    chunk_size = min(chunk_size or max(1, _LOGITS_BYTES // (4 * width)), max(1, tokens))
    rows = chunk_size
    if labels.device.type == "cpu":
        rows = min(rows, max(1, _CACHE_BYTES // (4 * width)))
    dtype = _at_least_float32(student.inputs[0].dtype)
    for side in (student, teacher):
        if side is not None:
            side.prepare(torch.empty((chunk_size, width), dtype=dtype, device=labels.device))
    scratch = torch.empty((4, rows, width), dtype=dtype, device=labels.device)
    parts = []
    for start in range(0, max(1, tokens), chunk_size):  # no tokens are one empty chunk: the statistics need names
        chunk = slice(start, min(start + chunk_size, tokens))
        logits, target = student.project(chunk), labels[chunk]
        teacher_logits = None if teacher is None else teacher.project(chunk, logits)
        for block in range(0, max(1, len(logits)), rows):
            piece = slice(block, min(block + rows, len(logits)))
            beside = None if teacher_logits is None else teacher_logits[piece]
            memory = scratch[:, : len(target[piece])]
            parts.append(chunk_loss(logits[piece], beside, target[piece], memory, student.wanted))
        if student.wanted:
            student.fold(chunk, logits)
    return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}


class _GradientInForward(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, walk: Callable[[], Any], *inputs: Tensor) -> tuple[Tensor, ...]:
        loss, statistics, gradients = walk()
        ctx.dtypes = [tensor.dtype for tensor in inputs]
        ctx.save_for_backward(*gradients)
        ctx.mark_non_differentiable(*statistics)
        return loss, *statistics

    @staticmethod
    @once_differentiable
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


def _inputs(logits: Tensor | Projection) -> tuple[Tensor, ...]:
    """What may get a gradient."""
    if isinstance(logits, Tensor):
        return (logits,)
    # Frozen ones are left out where autograd does the work.
    parameters = [p for p in logits.head.parameters() if p.requires_grad or _is_plain(logits.head)]
    return (logits.hidden, *parameters)


def _is_plain(head: nn.Module) -> bool:
    return type(head) is nn.Linear and not has_forward_hooks(head)


def _side(logits: Logits, with_gradient: bool) -> "_Side":
    if isinstance(logits, Tensor):
        return _Dense(_inputs(logits), with_gradient, logits.shape[-1])
    if isinstance(logits, TopLogProbs):
        return _Top((logits.log_probs, logits.tokens, logits.rest), with_gradient, logits.vocab_size)
    if any(isinstance(module, FSDPModule) for module in logits.head.modules()):
        raise UsageError(
            "the output layer is an FSDP unit of its own, whose weight would be gathered chunk by chunk: shard it "
            "together with the root module instead."
        )
    kind = _Linear if _is_plain(logits.head) else _Module
    return kind(_inputs(logits), with_gradient, _width(logits), logits)


def _width(projection: Projection) -> int:
    weight = getattr(projection.head, "weight", None)
    if isinstance(weight, Tensor):
        return weight.shape[0]
    with torch.no_grad():
        return projection.head(projection.hidden[:1]).shape[-1]


class _Side(ABC):
    """Gives logits chunk by chunk and takes back their gradients.

    Args:
        inputs: what may get a gradient.
        with_gradient: whether those of them that require a gradient get one.
        width: outputs, padding included.
        projection: where the logits come from, unless they are the inputs.
    """

    def __init__(
        self, inputs: tuple[Tensor, ...], with_gradient: bool, width: int, projection: Projection | None = None
    ) -> None:
        self.inputs = inputs
        self.width = width
        self.gradients: list[Tensor | None] = [
            torch.zeros_like(tensor, dtype=_at_least_float32(tensor.dtype))
            if with_gradient and tensor.requires_grad
            else None
            for tensor in inputs
        ]
        self.wanted = any(gradient is not None for gradient in self.gradients)
        if projection is not None:
            self.head, self.soft_cap = projection.head, projection.soft_cap
            device = projection.hidden.device.type
            enabled, dtype = torch.is_autocast_enabled(device), torch.get_autocast_dtype(device)
            # As it is outside, where the head would be called; the walk is without.
            self.autocast = partial(torch.autocast, device, dtype, enabled)
            self.dtype = dtype if enabled else next(self.head.parameters(), projection.hidden).dtype

    def prepare(self, buffer: Tensor) -> None:
        """Take the memory for the logits of one chunk, cut to the common width."""
        self.buffer = buffer
        self.cut = buffer.shape[1]

    @abstractmethod
    def project(self, chunk: slice, student: Tensor | None = None) -> Tensor:
        """Logits ``[rows, cut]`` in the buffer; a teacher is given the student's."""

    @abstractmethod
    def fold(self, chunk: slice, gradient: Tensor) -> None:
        """Add up the gradients of the inputs, given that of the logits ``[rows, cut]``, which may be overwritten."""


class _Dense(_Side):
    def project(self, chunk: slice, student: Tensor | None = None) -> Tensor:
        logits = self.inputs[0].detach()[chunk, : self.cut]
        return self.buffer[: len(logits)].copy_(logits)

    def fold(self, chunk: slice, gradient: Tensor) -> None:
        if (total := self.gradients[0]) is not None:
            total[chunk, : self.cut] = gradient


class _Top(_Side):
    def project(self, chunk: slice, student: Tensor | None = None) -> Tensor:
        assert student is not None
        log_probs, tokens, rest = (tensor[chunk] for tensor in self.inputs)
        logits = self.buffer[: len(log_probs)].copy_(student)
        row, column = (tokens < self.cut).nonzero(as_tuple=True)  # the student may have fewer outputs
        known = (row, tokens[row, column])
        logits[known] = -torch.inf
        logits += rest - logits.logsumexp(-1, keepdim=True)
        logits[known] = log_probs[row, column].to(logits.dtype)
        return logits

    def fold(self, chunk: slice, gradient: Tensor) -> None:
        raise NotImplementedError("a teacher's side gets no gradient")


class _Linear(_Side):
    def prepare(self, buffer: Tensor) -> None:
        super().prepare(buffer)
        # Views, or one copy in the precision of the products; not one a chunk.
        hidden, weight, *bias = (tensor.detach() for tensor in self.inputs)
        self.hidden, self.weight = hidden.to(self.dtype), weight[: self.cut].to(self.dtype)
        self.bias = bias[0][: self.cut].to(self.dtype) if bias else None

    def project(self, chunk: slice, student: Tensor | None = None) -> Tensor:
        hidden = self.hidden[chunk]
        buffer = self.buffer[: len(hidden)]
        logits = buffer if buffer.dtype == self.dtype else self.weight.new_empty(buffer.shape)
        torch.mm(hidden, self.weight.T, out=logits)
        if self.bias is not None:
            logits += self.bias
        if self.soft_cap is not None:
            logits.div_(self.soft_cap).tanh_()
            self.tanh = logits.clone() if self.wanted else None
            logits.mul_(self.soft_cap)
        return logits if logits is buffer else buffer.copy_(logits)

    def fold(self, chunk: slice, gradient: Tensor) -> None:
        if self.soft_cap is not None and self.tanh is not None:
            gradient.addcmul_(gradient, self.tanh.square_(), value=-1)
        of_hidden, of_weight, *of_bias = self.gradients
        if of_bias and of_bias[0] is not None:
            of_bias[0][: self.cut] += gradient.sum(0)
        hidden = self.hidden[chunk]
        low, scale = _lower(gradient, self.dtype, hidden)
        if of_hidden is not None:
            of_hidden[chunk] = _rescale(torch.mm(low, self.weight), scale)
        if of_weight is not None and of_weight.dtype == self.dtype:
            of_weight[: self.cut].addmm_(low.T, hidden)
        elif of_weight is not None:
            of_weight[: self.cut] += _rescale(torch.mm(low.T, hidden), scale)


class _Module(_Side):
    logits: Tensor | None

    def project(self, chunk: slice, student: Tensor | None = None) -> Tensor:
        with torch.set_grad_enabled(self.wanted), self.autocast():
            self.hidden = self.inputs[0][chunk].detach().requires_grad_(self.wanted)
            self.logits = self.head(self.hidden)[:, : self.cut]
            if self.soft_cap is not None:
                self.logits = torch.tanh(self.logits / self.soft_cap) * self.soft_cap
        return self.buffer[: len(self.hidden)].copy_(self.logits.detach())

    def fold(self, chunk: slice, gradient: Tensor) -> None:
        assert self.logits is not None
        low, scale = _lower(gradient, self.logits.dtype, self.hidden.detach())
        parts = torch.autograd.grad(self.logits, (self.hidden, *self.inputs[1:]), low, allow_unused=True)
        for index, (part, total) in enumerate(zip(parts, self.gradients, strict=True)):
            if part is not None and total is not None:
                (total[chunk] if index == 0 else total).add_(_rescale(part, scale))
        self.logits = None  # and with it the graph


def _at_least_float32(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


def _lower(gradient: Tensor, dtype: torch.dtype, hidden: Tensor) -> tuple[Tensor, Tensor | None]:
    """The gradient in the precision of the products, and what these are to be multiplied with.

    float16 has so small a range that the largest gradient is brought to 1, where small ones do not vanish, or below,
    where the products with the hidden states do not overflow.
    """
    if dtype != torch.float16 or not gradient.numel():
        return gradient.to(dtype), None
    peak = gradient.abs().amax().clamp(min=torch.finfo(gradient.dtype).tiny)
    scale = peak * (len(hidden) / 2**15 * hidden.abs().amax().to(peak.dtype)).clamp(min=1)
    return gradient.div_(scale).to(dtype), scale


def _rescale(product: Tensor, scale: Tensor | None) -> Tensor:
    return product if scale is None else product.to(scale.dtype) * scale
