"""Project hidden states onto the vocabulary and compare, a chunk of tokens at a time.

The logits of a batch, ``[tokens, vocab]``, are the largest tensor of a distillation step and are needed for a moment
only. Here they exist for one chunk: it is projected, compared, and the gradient with respect to its logits is added at
once to the gradients of hidden states and head. What stays is of the size of the inputs, and the backward pass only
scales it. (Gradients in the forward pass, chunk by chunk: Liger-Kernel, arXiv 2410.10989.)

Logits are never rounded below float32. On CUDA a product of half-precision factors comes out in float32, and the head's
gradient is summed up in it; a CPU has no such product, so that there the factors are widened once, which is slower.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.distributed.fsdp import FSDPModule

from akl_lightning.compat import has_forward_hooks
from akl_lightning.errors import UsageError
from akl_lightning.products import MULTIPLE, add_product, columns_for, in_range, multiply, resized

_CPU_BYTES = 2**26
"""Memory of a chunk's logits on each side, on a CPU; the products gain little from larger ones."""

_ROWS, _BYTES = 2048, 3 * 2**30
"""Tokens of a chunk elsewhere (on an H100, 1,024 were 5 to 9 % slower, 4,096 of 50,257 outputs 3 % faster and 2,432 of
128,256 slower), and what all of its logits and their gradients may take."""


class Compare(Protocol):
    """What is done with the logits of a chunk."""

    def __call__(
        self, student: Tensor, teacher: Tensor | None, labels: Tensor, /, *, gradient: Tensor | None
    ) -> dict[str, Tensor]:
        """Compare at every row.

        Args:
            student: logits ``[rows, vocab]`` in float32 or float64, of any row stride; may be overwritten.
            teacher: likewise, or the first columns alone where it has fewer outputs than the student.
            labels: ``[rows]``.
            gradient: gets the gradient of the summed loss with respect to the student's logits, ``[rows, vocab]``,
                perhaps in a lower precision; it may share the memory of ``student``. None where none is wanted.

        Returns:
            Statistics ``[rows]`` by name, ``loss`` among them.
        """


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


@dataclass
class Merged:
    logits: Any
    classes: Any


def rows_of(logits: Logits, tokens: slice) -> Logits:
    """Those of some tokens alone."""
    if isinstance(logits, Tensor):
        return logits[tokens]
    if isinstance(logits, Projection):
        return replace(logits, hidden=logits.hidden[tokens])
    parts = {name: getattr(logits, name)[tokens] for name in ("log_probs", "tokens", "rest")}
    return replace(logits, **parts)


def project_and_compare(
    student: Logits, teacher: Logits | None, labels: Tensor, compare: Compare, chunk_size: int | None = None
) -> tuple[Tensor, dict[str, Tensor]]:
    """Compare student and teacher at every token without ever holding all logits.

    A teacher with more outputs than the student (padding) is cut to the student's.

    Args:
        student: gets gradients: its hidden states and the parameters of its head, or its logits.
        teacher: gets none; may be None.
        labels: ``[tokens]``.
        compare: see :class:`Compare`.
        chunk_size: tokens of a chunk, 1 or more; None for as many as suit the device.

    Returns:
        The loss, a scalar, summed over tokens and differentiable once; the statistics ``[tokens]`` by name, detached.

    Raises:
        UsageError: a head that FSDP shards as a unit of its own.

    >>> def squares(student, teacher, labels, gradient):
    ...     loss = (student - teacher).square().sum(-1)
    ...     if gradient is not None:
    ...         torch.sub(2 * student, 2 * teacher, out=gradient)
    ...     return {"loss": loss}
    >>> student, teacher = torch.ones(5, 3, requires_grad=True), torch.zeros(5, 3)
    >>> loss, statistics = project_and_compare(student, teacher, torch.zeros(5), squares, chunk_size=2)
    >>> loss.backward()
    >>> loss.item(), statistics["loss"].tolist(), student.grad[0].tolist()
    (15.0, [3.0, 3.0, 3.0, 3.0, 3.0], [2.0, 2.0, 2.0])
    """
    sides = [_side(logits) for logits in (student, teacher) if logits is not None]
    vocab = sides[0].outputs
    sides[0].wants_gradient = torch.is_grad_enabled() and any(tensor.requires_grad for tensor in sides[0].inputs)
    dtype = torch.promote_types(sides[0].inputs[0].dtype, torch.float32)
    rows = min(chunk_size or _rows(vocab, dtype, labels.device, len(sides)), max(1, len(labels)))
    return _GradientInForward.apply(sides, (rows, vocab, dtype), labels, compare, *sides[0].inputs)


def _rows(vocab: int, dtype: torch.dtype, device: torch.device, sides: int) -> int:
    """How many tokens make a chunk."""
    if device.type == "cpu":
        return max(1, _CPU_BYTES // (dtype.itemsize * vocab))
    return max(1, min(_ROWS, _BYTES // ((dtype.itemsize * sides + 2) * vocab)))  # two bytes for the gradient


class _GradientInForward(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        sides: "list[_Side]",
        size: tuple[int, int, torch.dtype],
        labels: Tensor,
        compare: Compare,
        *inputs: Tensor,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        student, rows, parts = sides[0], size[0], []
        with torch.autocast(labels.device.type, enabled=False), _name_the_remedy(rows):
            for side in sides:
                side.prepare(*size)  # the teacher may have fewer outputs
            for start in range(0, max(1, len(labels)), rows):  # no tokens: an empty chunk, for the names
                chunk = slice(start, min(start + rows, len(labels)))
                logits = student.project(chunk, None)
                teacher_logits = sides[1].project(chunk, logits) if len(sides) > 1 else None
                gradient = student.gradient_of(logits) if student.wants_gradient else None
                parts.append(compare(logits, teacher_logits, labels[chunk], gradient=gradient))
                if gradient is not None:
                    student.accumulate(chunk, gradient)
        ctx.dtypes = [tensor.dtype for tensor in inputs]
        ctx.save_for_backward(*student.sums())
        statistics = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
        return statistics["loss"].sum(), statistics

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, scale: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
        # A loss scale (16-mixed) comes in here, before gradients are cut to the precision of the inputs.
        unscaled = scale.device.type == "cpu" and scale == 1  # elsewhere, looking would wait for the device
        return (None,) * 4 + tuple(
            None if gradient is None else gradient.to(dtype) if unscaled else _scaled(gradient, scale, dtype)
            for gradient, dtype in zip(ctx.saved_tensors, ctx.dtypes, strict=True)
        )


def _scaled(gradient: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    if gradient.dtype != dtype:  # in one pass
        return torch.mul(gradient, scale, out=torch.empty_like(gradient, dtype=dtype))
    # In place, which autograd notices: a second backward pass is its usual error, never a wrong gradient.
    return gradient.mul_(scale)


@contextmanager
def _name_the_remedy(rows: int) -> Iterator[None]:
    try:
        yield
    except torch.OutOfMemoryError as error:
        error.add_note(f"The logits of {rows:,} tokens existed at a time: a smaller criterion.chunk_size takes less.")
        raise


# --------------------------------------------------------------------------------------------------------------------
# One side: ready-made logits, a linear head, or any other head


def _side(logits: Logits) -> "_Side":
    if isinstance(logits, Tensor):
        return _ReadyMade((logits,), logits.shape[-1])
    if isinstance(logits, TopLogProbs):
        return _TopAlone((logits.log_probs, logits.tokens, logits.rest), logits.vocab_size)
    if any(isinstance(module, FSDPModule) for module in logits.head.modules()):
        raise UsageError(
            "the output layer is an FSDP unit of its own, whose weight would be gathered chunk by chunk: shard it "
            "together with the root module instead."
        )
    head = logits.head
    if type(head) is nn.Linear and not has_forward_hooks(head):
        return _LinearHead(logits, head)
    return _ModuleHead(logits)


class _Side(ABC):
    """The student's logits or the teacher's, chunk by chunk; the student's take their gradients back.

    Args:
        inputs: what may get a gradient.
        outputs: size of the vocabulary, padding included.
    """

    wants_gradient = False
    spare = 0
    """Columns behind the vocabulary that a side wants for itself."""

    def __init__(self, inputs: tuple[Tensor, ...], outputs: int) -> None:
        self.inputs = inputs
        self.outputs = outputs
        self.gradients: list[Tensor | None] = [None] * len(inputs)

    def prepare(self, rows: int, vocab: int, dtype: torch.dtype) -> None:
        """Take the memory for the logits of so many tokens, and of so many outputs if there are."""
        device = self.inputs[0].device
        self.vocab = min(vocab, self.outputs)
        self.columns = columns_for(self.vocab, device)
        self.logits = torch.empty((rows, self.columns + self.spare), dtype=dtype, device=device)
        if self.wants_gradient:
            self.gradients = [self.zeros(tensor) if tensor.requires_grad else None for tensor in self.inputs]

    def zeros(self, tensor: Tensor) -> Tensor:
        """What the gradients of an input are added to."""
        return torch.zeros_like(tensor, dtype=torch.promote_types(tensor.dtype, torch.float32))

    def sums(self) -> list[Tensor | None]:
        """The gradients of the inputs, of those that get one."""
        return self.gradients

    @abstractmethod
    def project(self, chunk: slice, student: Tensor | None) -> Tensor:
        """Logits ``[tokens of the chunk, vocab]``; a teacher's are given the student's."""

    def gradient_of(self, logits: Tensor) -> Tensor:
        """Where the gradient of these logits is wanted."""
        return logits

    def accumulate(self, chunk: slice, gradient: Tensor) -> None:  # noqa: B027 (a teacher has none)
        """Add up the gradients of the inputs, given that of the logits, which may be overwritten."""


class _ReadyMade(_Side):
    def project(self, chunk: slice, student: Tensor | None) -> Tensor:
        given = self.inputs[0].detach()[chunk, : self.vocab]
        logits = self.logits[: len(given), : self.vocab].copy_(given)
        if given.dtype == torch.float16:  # what masks in it would be a number like any other
            logits.masked_fill_(given <= torch.finfo(torch.float16).min, -torch.inf)
        return logits

    def accumulate(self, chunk: slice, gradient: Tensor) -> None:
        if (total := self.gradients[0]) is not None:
            total[chunk, : self.vocab] = gradient


class _TopAlone(_Side):
    spare = MULTIPLE  # the student may have fewer outputs: what it lacks is written there, where nobody looks

    def project(self, chunk: slice, student: Tensor | None) -> Tensor:
        assert student is not None
        log_probs, tokens, rest = (tensor[chunk] for tensor in self.inputs)
        whole = self.logits[: len(log_probs)]
        logits, tokens = whole[:, : self.vocab].copy_(student[:, : self.vocab]), tokens.clamp(max=self.vocab)
        whole.scatter_(-1, tokens, -torch.inf)
        logits += rest - logits.logsumexp(-1, keepdim=True)
        whole.scatter_(-1, tokens, log_probs.to(whole.dtype))
        return logits


class _LinearHead(_Side):
    def __init__(self, projection: Projection, head: nn.Linear) -> None:
        super().__init__((projection.hidden, *head.parameters()), len(head.weight))
        self.soft_cap = projection.soft_cap
        device = projection.hidden.device.type
        self.dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else head.weight.dtype
        if device != "cuda":  # elsewhere no product of lower precision comes out in float32
            self.dtype = torch.promote_types(self.dtype, torch.float32)

    def prepare(self, rows: int, vocab: int, dtype: torch.dtype) -> None:
        super().prepare(rows, vocab, dtype)
        # Views, or one copy in the precision of the products and with as many rows as columns; not one a chunk.
        hidden, weight, *bias = (tensor.detach() for tensor in self.inputs)
        self.hidden, self.weight = hidden.to(self.dtype), resized(weight.to(self.dtype), self.columns)
        self.bias = resized(bias[0].to(dtype), self.columns) if bias else None
        # In the precision of the products, but where more is done to it before it enters them.
        in_place = self.dtype in (dtype, torch.float16) or self.soft_cap is not None
        self.gradient = self.logits
        if self.wants_gradient and not in_place:
            self.gradient = torch.empty_like(self.logits, dtype=self.dtype)

    def zeros(self, tensor: Tensor) -> Tensor:
        if tensor is self.inputs[0] or len(tensor) >= self.columns:
            return super().zeros(tensor)
        return super().zeros(tensor.detach()[:1].expand(self.columns, *tensor.shape[1:]))

    def sums(self) -> list[Tensor | None]:
        pairs = zip(self.gradients, self.inputs, strict=True)
        return [None if total is None else total[: len(tensor)] for total, tensor in pairs]

    def project(self, chunk: slice, student: Tensor | None) -> Tensor:
        hidden = self.hidden[chunk]
        logits = self.logits[: len(hidden)]
        multiply(hidden, self.weight.T, out=logits)
        if self.bias is not None:
            logits += self.bias
        if self.soft_cap is not None:
            logits.div_(self.soft_cap).tanh_()
            self.tanh = logits.clone() if self.wants_gradient else None
            logits.mul_(self.soft_cap)
        return logits[:, : self.vocab]

    def gradient_of(self, logits: Tensor) -> Tensor:
        return self.gradient[: len(logits), : self.vocab]

    def accumulate(self, chunk: slice, gradient: Tensor) -> None:
        hidden = self.hidden[chunk]
        gradient = self.gradient[: len(hidden)]  # with the columns behind the vocabulary
        gradient[:, self.vocab :] = 0
        if self.soft_cap is not None and self.tanh is not None:
            gradient.addcmul_(gradient, self.tanh.square_(), value=-1)
        of_hidden, of_weight, *of_bias = self.gradients
        if of_bias and of_bias[0] is not None:
            of_bias[0][: self.columns] += gradient.sum(0, dtype=of_bias[0].dtype)
        factor, scale = in_range(gradient, self.dtype, hidden)
        if of_hidden is not None:
            multiply(factor, self.weight, out=of_hidden[chunk])
            if scale is not None:
                of_hidden[chunk] *= scale
        if of_weight is not None:
            add_product(of_weight[: self.columns], factor.T, hidden, scale)


class _ModuleHead(_Side):
    """Autograd does the work, in the precision that the module chooses; the logits have it, too."""

    def __init__(self, projection: Projection) -> None:
        # Frozen parameters are left out, which autograd would refuse.
        trained = [parameter for parameter in projection.head.parameters() if parameter.requires_grad]
        weight = getattr(projection.head, "weight", None)
        if not isinstance(weight, Tensor):
            with torch.no_grad():
                weight = projection.head(projection.hidden[:1]).T
        super().__init__((projection.hidden, *trained), len(weight))
        self.head, self.soft_cap = projection.head, projection.soft_cap
        device = projection.hidden.device.type
        # As it is outside, where the head would be called; the walk is without.
        enabled, dtype = torch.is_autocast_enabled(device), torch.get_autocast_dtype(device)
        self.autocast = partial(torch.autocast, device, dtype, enabled)

    def project(self, chunk: slice, student: Tensor | None) -> Tensor:
        with torch.set_grad_enabled(self.wants_gradient), self.autocast():
            self.hidden = self.inputs[0][chunk].detach().requires_grad_(self.wants_gradient)
            self.own: Tensor | None = self.head(self.hidden)[:, : self.vocab]
            if self.soft_cap is not None:
                self.own = torch.tanh(self.own / self.soft_cap) * self.soft_cap
        return self.logits[: len(self.hidden), : self.vocab].copy_(self.own.detach())

    def accumulate(self, chunk: slice, gradient: Tensor) -> None:
        assert self.own is not None
        factor, scale = in_range(gradient, self.own.dtype, self.hidden.detach())
        parts = torch.autograd.grad(self.own, (self.hidden, *self.inputs[1:]), factor, allow_unused=True)
        for index, (part, total) in enumerate(zip(parts, self.gradients, strict=True)):
            if part is not None and total is not None:
                (total[chunk] if index == 0 else total).add_(part if scale is None else part.to(scale.dtype) * scale)
        self.own = None  # and with it the graph
