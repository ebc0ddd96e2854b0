"""The pairs of pairs.py, under the same names, for the Triton kernel.

They are called with ``r = log p - log q``, which keeps the digits of a student near its teacher and may be infinite, or
NaN where ``p = q = 0``; with ``p`` and ``q``; and with the divergence's constant ``a`` and ``b = 1 - a``. They return
``g`` and ``q c``, whose slope ``c`` may lack a constant that all tokens share.
"""

# mypy: disable-error-code="no-untyped-def"
from __future__ import annotations

from collections.abc import Callable
from typing import Any

from akl_lightning.kernels.triton_common import jit, log2, reciprocal, tl


@jit
def _expm1(x):
    series = x * (1 + x * (0.5 + x * (0.16666667 + x * 0.041666667)))
    return tl.where(tl.abs(x) < 0.0625, series, tl.exp2(x * 1.4426950408889634) - 1)


@jit
def _log1p(x):
    z = x * reciprocal(2 + x)
    zz = z * z
    series = z * (2 + zz * (0.6666667 + zz * (0.4 + zz * 0.2857143)))
    return tl.where(tl.abs(x) < 0.25, series, log2(1 + x) * 0.6931471805599453)


@jit
def _bounded(r):
    """Beyond e⁸⁰ the smaller of p and q counts nothing; NaN, where both are 0, becomes a number."""
    return tl.minimum(tl.maximum(r, -80.0), 80.0)


@jit
def jensen_shannon(r, p, q, a, b):
    r = _bounded(r)
    log_m_over_q = _log1p(a * _expm1(r))
    reverse = -b * q * log_m_over_q
    return a * p * (r - log_m_over_q) + reverse, reverse


@jit
def skew_forward_kl(r, p, q, a, b):
    x = b * _expm1(-_bounded(r))
    # q c + b q: a slope of -b is nothing but a constant, and without it there are digits near the teacher.
    return -p * _log1p(x), b * q * (x * reciprocal(1 + x))


@jit
def skew_reverse_kl(r, p, q, a, b):
    x = b * _expm1(_bounded(r))
    log_m_over_q = _log1p(x)
    return -q * log_m_over_q, q * (a * (x * reciprocal(1 + x)) - log_m_over_q)


@jit
def total_variation(r, p, q, a, b):
    # By the ratio: a fused multiply-add may round equal p and q apart.
    return tl.where(r == 0, 0.0, tl.abs(p - q) * 0.5), tl.where(r > 0, -0.5 * q, tl.where(r < 0, 0.5 * q, 0.0))


PAIRS: dict[str | None, Callable[..., Any]] = {
    "jensen_shannon": jensen_shannon,
    "skew_forward_kl": skew_forward_kl,
    "skew_reverse_kl": skew_reverse_kl,
    "total_variation": total_variation,
}
"""Every pair but those that are ``a FKL + b RKL``, which the kernel has from its first walk."""
