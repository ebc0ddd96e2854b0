"""Project hidden states onto the vocabulary and compare, a chunk of tokens at a time.

The logits of a batch, ``[tokens, vocab]``, are the largest tensor of a distillation step and are needed for a moment
only. Here they exist for one chunk: it is projected, compared, and the gradient with respect to its logits is added at
once to the gradients of hidden states and head. What stays is of the size of the inputs, and the backward pass only
scales it. (Gradients in the forward pass, chunk by chunk: Liger-Kernel, arXiv 2410.10989.)

Logits are never rounded below float32. On CUDA a product of half-precision factors comes out in float32, and the head's
gradient is summed up in it; a CPU has no such product, so that there the factors are widened once, which is slower.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from akl_lightning.sides import Logits as Logits
from akl_lightning.sides import Merged as Merged
from akl_lightning.sides import Projection as Projection
from akl_lightning.sides import Side, arranged, side_of
from akl_lightning.sides import TopLogProbs as TopLogProbs
from akl_lightning.sides import rows_of as rows_of

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

        What else :func:`project_and_compare` is given of each token comes as keyword arguments, ``[rows]``.

        Args:
            student: logits ``[rows, vocab]`` in float32 or float64, of any row stride; may be overwritten.
            teacher: likewise, or the first columns alone where it has fewer outputs than the student.
            labels: ``[rows]``.
            gradient: gets the gradient of the summed loss with respect to the student's logits, ``[rows, vocab]``,
                perhaps in a lower precision; it may share the memory of ``student``. None where none is wanted.

        Returns:
            Statistics ``[rows]`` by name, ``loss`` among them.
        """


def project_and_compare(
    student: Logits,
    teacher: Logits | None,
    labels: Tensor,
    compare: Compare,
    chunk_size: int | None = None,
    **per_token: Tensor,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Compare student and teacher at every token without ever holding all logits.

    A teacher with more outputs than the student (padding) is cut to the student's. With a :class:`Merged` teacher the
    logits of both come arranged as its classes say, and the gradient is wanted likewise.

    Args:
        student: gets gradients: its hidden states and the parameters of its head, or its logits.
        teacher: gets none; may be None.
        labels: ``[tokens]``.
        compare: see :class:`Compare`.
        chunk_size: tokens of a chunk, 1 or more; None for as many as suit the device.
        per_token: what else there is of each token, ``[tokens]``; ``compare`` gets that of a chunk under the same name.

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
    sides = [side_of(logits) for logits in (student, teacher) if logits is not None]
    if isinstance(teacher, Merged):
        classes = teacher.classes.to(labels.device)
        pairs = zip(("student", "teacher"), sides, (classes.student, classes.teacher), strict=True)
        sides = [arranged(name, side, columns) for name, side, columns in pairs]
    # Arranged sides keep all of their outputs, of whom the larger counts.
    vocab = max(side.outputs for side in sides) if isinstance(teacher, Merged) else sides[0].outputs
    sides[0].wants_gradient = torch.is_grad_enabled() and any(tensor.requires_grad for tensor in sides[0].inputs)
    dtype = torch.promote_types(sides[0].inputs[0].dtype, torch.float32)
    rows = min(chunk_size or _rows(vocab, dtype, labels.device, len(sides)), max(1, len(labels)))
    return _GradientInForward.apply(sides, (rows, vocab, dtype), labels, per_token, compare, *sides[0].inputs)


def _rows(vocab: int, dtype: torch.dtype, device: torch.device, sides: int) -> int:
    """How many tokens make a chunk."""
    if device.type == "cpu":
        return max(1, _CPU_BYTES // (dtype.itemsize * vocab))
    return max(1, min(_ROWS, _BYTES // ((dtype.itemsize * sides + 2) * vocab)))  # two bytes for the gradient


class _GradientInForward(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        sides: list[Side],
        size: tuple[int, int, torch.dtype],
        labels: Tensor,
        per_token: dict[str, Tensor],
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
                more = {name: values[chunk] for name, values in per_token.items()}
                parts.append(compare(logits, teacher_logits, labels[chunk], gradient=gradient, **more))  # type: ignore[call-arg]
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
        return (None,) * 5 + tuple(
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
