"""How hidden states are stored: a few tensors per shard, in at most as many bytes as the student can tell apart."""

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn.functional import pad

from akl_lightning.errors import UsageError


class Codec(ABC):
    """Turns hidden states into small tensors and back, row by row.

    Subclass it, give it a ``name``, and ``akl cache`` takes it by that name; so does the training that reads the cache,
    which has to import it, too.

    >>> class Half(Codec):
    ...     name = "half"
    ...     def encode(self, hidden):
    ...         return {"values": hidden.half()}
    ...     def decode(self, parts):
    ...         return parts["values"].float()
    >>> find_codec("half").bytes_per_token(576)
    1152
    """

    name: ClassVar[str]

    known: ClassVar[dict[str, type["Codec"]]] = {}
    """Every codec by its name."""

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if "name" in vars(cls):
            Codec.known[cls.name] = cls

    @abstractmethod
    def encode(self, hidden: Tensor) -> dict[str, Tensor]:
        """Store hidden states ``[tokens, hidden]`` as tensors ``[tokens, ...]`` by name."""

    @abstractmethod
    def decode(self, parts: Mapping[str, Tensor]) -> Tensor:
        """Hidden states ``[tokens, hidden]`` from the tensors that :meth:`encode` gave."""

    def bytes_per_token(self, hidden_size: int) -> int:
        """Bytes that a row of this size takes."""
        return sum(part.nbytes for part in self.encode(torch.zeros(1, hidden_size)).values())


class Bfloat16(Codec):
    """Values rounded to bfloat16; relative error at most 2⁻⁸."""

    name = "bfloat16"

    def encode(self, hidden: Tensor) -> dict[str, Tensor]:
        return {"values": hidden.bfloat16()}

    def decode(self, parts: Mapping[str, Tensor]) -> Tensor:
        return parts["values"]


class GroupedIntegers(Codec):
    """Integers on a μ-law scale, and the largest magnitude of each group of neighbouring values, in bfloat16.

    A hidden state has a few values that are much larger than the others of their group. Of ``y = x / peak`` the code is
    ``levels * sign(y) * log(1 + μ abs(y)) / log(1 + μ)``, rounded (ITU-T G.711, there with μ = 255), which is finer
    where most values are: with μ = 16 the error of int8 has 0.4 of the norm that even steps give.

    The error of a value is at most ``(peak / μ + abs(x)) * ((1 + μ) ** (1 / (2 levels)) - 1)``, peak in bfloat16. The
    last group may be shorter.
    """

    group: ClassVar[int]
    """Values that share a scale."""

    levels: ClassVar[int]
    """The largest integer; its negative is the smallest."""

    mu: ClassVar[float] = 16.0

    def encode(self, hidden: Tensor) -> dict[str, Tensor]:
        hidden = hidden.float()
        size, group = hidden.shape[-1], min(self.group, hidden.shape[-1])
        scales = pad(hidden, (0, -size % group)).unflatten(-1, (-1, group)).abs().amax(-1).bfloat16()
        peaks = _spread(scales.float(), group, size)
        # By the scale as it is stored; a group of zeros has none.
        y = hidden / peaks.where(peaks > 0, 1)
        codes = y.sign() * (torch.log1p(self.mu * y.abs()) * (self.levels / math.log1p(self.mu)))
        return {"codes": codes.round().clamp(-self.levels, self.levels).to(torch.int8), "scales": scales}

    def decode(self, parts: Mapping[str, Tensor]) -> Tensor:
        scales, codes = parts["scales"].float(), parts["codes"]
        size = codes.shape[-1]
        y = torch.arange(-self.levels, self.levels + 1, device=codes.device) / self.levels
        values = y.sign() * torch.expm1(y.abs() * math.log1p(self.mu)) / self.mu
        return values[codes.long() + self.levels].mul_(_spread(scales, min(self.group, size), size))


def _spread(scales: Tensor, group: int, size: int) -> Tensor:
    return scales.repeat_interleave(group, -1)[..., :size]


class Int8(GroupedIntegers):
    """8 bits a value, a scale per 64."""

    name, group, levels = "int8", 64, 127


class Int4(GroupedIntegers):
    """4 bits a value, a scale per 32. The hidden size must be even."""

    name, group, levels = "int4", 32, 7

    def encode(self, hidden: Tensor) -> dict[str, Tensor]:
        if hidden.shape[-1] % 2:
            raise UsageError(f"int4 stores values in pairs and the hidden size is {hidden.shape[-1]}: use int8.")
        parts = super().encode(hidden)
        low, high = (parts["codes"] + 8).to(torch.uint8).unflatten(-1, (-1, 2)).unbind(-1)
        return {**parts, "codes": low | high << 4}

    def decode(self, parts: Mapping[str, Tensor]) -> Tensor:
        stored = parts["codes"]
        codes = torch.stack([stored & 15, stored >> 4], -1).flatten(-2).to(torch.int8) - 8
        return super().decode({**parts, "codes": codes})


def find_codec(name: str) -> Codec:
    """The codec of a name, a user's own included.

    Raises:
        UsageError: there is none.
    """
    if name not in Codec.known:
        raise UsageError(f"unknown codec {name!r}: use one of {', '.join(sorted(Codec.known))}, or import your own.")
    return Codec.known[name]()
