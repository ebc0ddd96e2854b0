"""Where the logits of a chunk come from: they are given, or a linear head makes them, or any other module does.

A side makes the logits of one chunk after the other in memory that is taken once; the student's takes the gradient of
each chunk back, up to what made the logits.
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule

from akl_lightning.compat import has_forward_hooks
from akl_lightning.errors import UsageError
from akl_lightning.kernels.classes import Classes, Columns
from akl_lightning.products import MULTIPLE, add_product, columns_for, in_range, multiply, resized


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


@dataclass(frozen=True)
class Merged:
    """A teacher over another vocabulary than the student's, to be compared in classes of the outputs of both.

    Args:
        logits: the teacher's, over its own vocabulary.
        classes: of every output of the student and of the teacher.
    """

    logits: Tensor | Projection
    classes: Classes


Logits = Tensor | Projection | TopLogProbs | Merged
"""Ready-made logits ``[tokens, vocab]``, or the means to compute them."""


def rows_of(logits: Logits, tokens: slice | Tensor) -> Logits:
    """Those of some tokens alone, given as a slice or by their numbers."""
    if isinstance(logits, Tensor):
        return logits[tokens]
    if isinstance(logits, Projection):
        return replace(logits, hidden=logits.hidden[tokens])
    if isinstance(logits, Merged):
        return replace(logits, logits=rows_of(logits.logits, tokens))  # type: ignore[arg-type]
    parts = {name: getattr(logits, name)[tokens] for name in ("log_probs", "tokens", "rest")}
    return replace(logits, **parts)


def side_of(logits: Logits) -> "Side":
    """The side that makes these logits; a merged teacher's are those over its own vocabulary."""
    if isinstance(logits, Merged):
        return side_of(logits.logits)
    if isinstance(logits, Tensor):
        return ReadyMade((logits,), logits.shape[-1])
    if isinstance(logits, TopLogProbs):
        return TopAlone((logits.log_probs, logits.tokens, logits.rest), logits.vocab_size)
    if any(isinstance(module, FSDPModule) for module in logits.head.modules()):
        raise UsageError(
            "the output layer is an FSDP unit of its own, whose weight would be gathered chunk by chunk: shard it "
            "together with the root module instead."
        )
    head = logits.head
    if type(head) is nn.Linear and not has_forward_hooks(head):
        return LinearHead(logits, head)
    return ModuleHead(logits)


def arranged(name: str, side: "Side", columns: Columns) -> "Side":
    """The same side with its outputs in another order, in which it takes their gradient back."""
    if len(columns.place) != side.outputs:
        raise UsageError(
            f"the {name} has {side.outputs:,} outputs, and the classes are of {len(columns.place):,}: give each output "
            "a class, padding too."
        )
    if isinstance(side, LinearHead) and takes_its_rows(side.inputs[0].device):
        side.arrange(columns)
        return side
    return Arranged(side, columns)


def takes_its_rows(device: torch.device) -> bool:
    """Whether a linear head's rows are arranged, and not its logits.

    Where micro-batches have some hundred tokens, as on a CPU, two copies of a weight and one of its gradient cost more.
    """
    return device.type != "cpu"


class Side(ABC):
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


class ReadyMade(Side):
    def project(self, chunk: slice, student: Tensor | None) -> Tensor:
        given = self.inputs[0].detach()[chunk, : self.vocab]
        logits = self.logits[: len(given), : self.vocab].copy_(given)
        if given.dtype == torch.float16:  # what masks in it would be a number like any other
            logits.masked_fill_(given <= torch.finfo(torch.float16).min, -torch.inf)
        return logits

    def accumulate(self, chunk: slice, gradient: Tensor) -> None:
        if (total := self.gradients[0]) is not None:
            total[chunk, : self.vocab] = gradient


class TopAlone(Side):
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


class LinearHead(Side):
    arranged: Columns | None = None

    def __init__(self, projection: Projection, head: nn.Linear) -> None:
        super().__init__((projection.hidden, *head.parameters()), len(head.weight))
        self.soft_cap = projection.soft_cap
        device = projection.hidden.device.type
        self.dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else head.weight.dtype
        if device != "cuda":  # elsewhere no product of lower precision comes out in float32
            self.dtype = torch.promote_types(self.dtype, torch.float32)

    def arrange(self, columns: Columns) -> None:
        """Take the weight's rows in another order, once, and so make the logits in it."""
        self.arranged, self.outputs = columns, len(columns.order)

    def prepare(self, rows: int, vocab: int, dtype: torch.dtype) -> None:
        super().prepare(rows, vocab, dtype)
        # Views, or one copy in the precision of the products and with as many rows as columns; not one a chunk.
        hidden, *parameters = (tensor.detach() for tensor in self.inputs)
        if self.arranged:
            parameters = [tensor.index_select(0, self.arranged.order) for tensor in parameters]
        weight, *bias = parameters
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
        of_hidden, *others = self.gradients
        if self.arranged:
            place = self.arranged.place
            return [of_hidden, *(None if total is None else total.index_select(0, place) for total in others)]
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


class ModuleHead(Side):
    """Autograd does the work, in the precision that the module chooses; the logits have it, too."""

    def __init__(self, projection: Projection) -> None:
        # Frozen parameters are left out, which autograd would refuse.
        trained = [parameter for parameter in projection.head.parameters() if parameter.requires_grad]
        weight = getattr(projection.head, "weight", None)
        if not isinstance(weight, Tensor):
            with torch.no_grad():
                weight = projection.head(projection.hidden[:1]).T
        super().__init__((projection.hidden, *trained), len(weight))
        self.projection = projection
        device = projection.hidden.device.type
        # As it is outside, where the head would be called; the walk is without.
        enabled, dtype = torch.is_autocast_enabled(device), torch.get_autocast_dtype(device)
        self.autocast = partial(torch.autocast, device, dtype, enabled)

    def project(self, chunk: slice, student: Tensor | None) -> Tensor:
        with torch.set_grad_enabled(self.wants_gradient), self.autocast():
            self.hidden = self.inputs[0][chunk].detach().requires_grad_(self.wants_gradient)
            self.own: Tensor | None = replace(self.projection, hidden=self.hidden).logits()[:, : self.vocab]
        return self.logits[: len(self.hidden), : self.vocab].copy_(self.own.detach())

    def accumulate(self, chunk: slice, gradient: Tensor) -> None:
        assert self.own is not None
        factor, scale = in_range(gradient, self.own.dtype, self.hidden.detach())
        parts = torch.autograd.grad(self.own, (self.hidden, *self.inputs[1:]), factor, allow_unused=True)
        for index, (part, total) in enumerate(zip(parts, self.gradients, strict=True)):
            if part is not None and total is not None:
                (total[chunk] if index == 0 else total).add_(part if scale is None else part.to(scale.dtype) * scale)
        self.own = None  # and with it the graph


class Arranged(Side):
    """Another side's logits, their columns in another order."""

    def __init__(self, side: Side, columns: Columns) -> None:
        super().__init__(side.inputs, len(columns.order))
        self.side, self.order = side, columns

    def prepare(self, rows: int, vocab: int, dtype: torch.dtype) -> None:
        self.side.wants_gradient = self.wants_gradient
        self.side.prepare(rows, self.side.outputs, dtype)
        columns = columns_for(self.outputs, self.side.logits.device)
        self.logits = self.side.logits.new_empty(rows, columns)[:, : self.outputs]

    def sums(self) -> list[Tensor | None]:
        return self.side.sums()

    def project(self, chunk: slice, student: Tensor | None) -> Tensor:
        self.own = self.side.project(chunk, student)
        index = self.order.order.expand(len(self.own), -1)
        return torch.gather(self.own, 1, index, out=self.logits[: len(self.own)])

    def accumulate(self, chunk: slice, gradient: Tensor) -> None:
        into = self.side.gradient_of(self.own)
        index = self.order.place.expand(len(gradient), -1)
        if into.dtype == gradient.dtype:
            torch.gather(gradient, 1, index, out=into)
        else:
            into.copy_(gradient.gather(1, index))
        self.side.accumulate(chunk, into)
