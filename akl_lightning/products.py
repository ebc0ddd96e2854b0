"""Matrix products that lose nothing: not rounded below float32, of fast sizes, in the range of their precision."""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

MULTIPLE = 64
"""On CUDA, products with a head whose rows are no multiple of it are several times slower."""


def columns_for(vocab: int, device: torch.device) -> int:
    """How many columns logits get, so that products with them are fast."""
    return -(-vocab // MULTIPLE) * MULTIPLE if device.type == "cuda" else vocab


def resized(tensor: Tensor, rows: int) -> Tensor:
    """The first rows of a tensor, and where it has not so many, zeros; a copy only then."""
    if len(tensor) >= rows:
        return tensor[:rows]
    return pad(tensor, (0, 0) * (tensor.dim() - 1) + (0, rows - len(tensor)))


def multiply(a: Tensor, b: Tensor, out: Tensor) -> None:
    """``out = a b``, not rounded below the precision of ``out``."""
    if a.dtype == out.dtype:
        with without_tf32(a):
            torch.mm(a, b, out=out)
    elif _is_half(a) and out.dtype == torch.float32:
        torch.mm(a, b, out_dtype=out.dtype, out=out)
    else:
        out.copy_(torch.mm(a, b))


def add_product(total: Tensor, a: Tensor, b: Tensor, scale: Tensor | None) -> None:
    """``total += scale a b``, likewise."""
    if a.dtype == total.dtype and scale is None:
        with without_tf32(a):
            total.addmm_(a, b)
    elif _is_half(a) and total.dtype == torch.float32 and scale is None and _adds_up_in_float32(a.device, a.dtype):
        torch.addmm(total, a, b, out_dtype=total.dtype, out=total)
    else:
        product = torch.empty_like(total)
        multiply(a, b, out=product)
        total += product if scale is None else product.mul_(scale)


def _is_half(tensor: Tensor) -> bool:
    return tensor.is_cuda and tensor.dtype in (torch.bfloat16, torch.float16)


@cache
def _adds_up_in_float32(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether the installed torch adds half-precision products to a float32 sum."""
    total, factor = torch.zeros(2, 2, device=device), torch.zeros(2, 2, device=device, dtype=dtype)
    try:
        torch.addmm(total, factor, factor, out_dtype=total.dtype, out=total)
    except (RuntimeError, TypeError):
        return False
    return True


@contextmanager
def without_tf32(factor: Tensor) -> Iterator[None]:
    """Run float32 products in float32, whatever the user allows for the rest of a model."""
    if not (factor.is_cuda and factor.dtype == torch.float32):
        yield
        return
    settings: Any = torch.backends.cuda.matmul
    # From torch 2.9 on there is a new name, and a flag that was set under one must not be read under the other.
    name, exact = ("fp32_precision", "ieee") if hasattr(settings, "fp32_precision") else ("allow_tf32", False)
    before = getattr(settings, name)
    setattr(settings, name, exact)
    try:
        yield
    finally:
        setattr(settings, name, before)


def in_range(gradient: Tensor, dtype: torch.dtype, hidden: Tensor) -> tuple[Tensor, Tensor | None]:
    """The gradient in the precision of the products, and what these are to be multiplied with.

    float16 has so small a range that the largest gradient is brought to 1, where small ones do not vanish, or below,
    where the products with the hidden states do not overflow.
    """
    if dtype != torch.float16 or not gradient.numel():
        return gradient.to(dtype), None
    peak = gradient.abs().amax().clamp(min=torch.finfo(gradient.dtype).tiny)
    scale = peak * (len(hidden) / 2**15 * hidden.abs().amax().to(peak.dtype)).clamp(min=1)
    return gradient.div_(scale).to(dtype), scale
