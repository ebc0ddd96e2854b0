"""How the logits of a chunk are compared: by a Triton kernel on a GPU, in plain torch anywhere else."""

import warnings
from functools import cache
from importlib.util import find_spec

from torch import Tensor

from akl_lightning.kernels import reference, triton
from akl_lightning.kernels.pairs import Comparison


def compare(
    student: Tensor,
    teacher: Tensor | None,
    labels: Tensor,
    how: Comparison,
    gradient: Tensor | None = None,
) -> dict[str, Tensor]:
    """Compare student and teacher at every row; see :func:`akl_lightning.kernels.reference.compare`."""
    if student.is_cuda:
        if triton.supports(student, teacher):
            return triton.compare(student, teacher, labels, how, gradient)
        _say_that_it_is_slow(str(student.dtype), student.shape[-1])
    return reference.compare(student, teacher, labels, how, gradient)


@cache
def _say_that_it_is_slow(dtype: str, vocab: int) -> None:
    reason = "Triton is not installed" if find_spec("triton") is None else f"the kernel takes no {dtype} of {vocab:,}"
    warnings.warn(
        f"logits on the GPU are compared in plain PyTorch, which is several times slower: {reason}.", stacklevel=3
    )
