from collections.abc import Mapping

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from akl_lightning.errors import UsageError
from akl_lightning.teachers.cache.codecs import Codec, find_codec


def bound(name: str, hidden: Tensor) -> Tensor:
    """Largest error of each value, as the docstrings say; a bit more for float32's own."""
    if name == "bfloat16":
        return hidden.abs() * 2**-8
    group, levels = {"int8": (64, 127), "int4": (32, 7)}[name]
    parts = [part.abs().amax(-1, keepdim=True).expand_as(part) for part in hidden.split(group, -1)]
    peaks = torch.cat(parts, -1) * (1 + 2**-8)
    return (peaks / 16 + hidden.abs()) * (17 ** (1 / (2 * levels)) - 1) * 1.001


@pytest.mark.parametrize("name", ["bfloat16", "int8", "int4"])
@given(
    size=st.sampled_from([2, 24, 64, 96, 130, 576]),
    tokens=st.integers(0, 5),
    exponent=st.integers(-20, 20),
    seed=st.integers(0, 99),
)
@settings(max_examples=60, deadline=None)
def test_what_comes_back_is_within_the_bound(name: str, size: int, tokens: int, exponent: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(tokens, size, generator=generator) * 2.0**exponent
    hidden[:, ::7] *= 50  # a few values of a hidden state are much larger than the others
    hidden[:1, : size // 2] = 0
    codec = find_codec(name)
    parts = codec.encode(hidden)
    assert all(len(part) == tokens for part in parts.values())
    back = codec.decode(parts).float()
    assert back.shape == hidden.shape
    assert ((back - hidden).abs() <= bound(name, hidden)).all()
    assert (back[:1, : size // 2] == 0).all()


@pytest.mark.parametrize(("name", "size"), [("bfloat16", 1152), ("int8", 594), ("int4", 324)])
def test_bytes_per_token(name: str, size: int) -> None:
    assert find_codec(name).bytes_per_token(576) == size


def test_a_codec_of_ones_own_is_found_by_its_name() -> None:
    class Rounded(Codec):
        name = "rounded"

        def encode(self, hidden: Tensor) -> dict[str, Tensor]:
            return {"values": hidden.round().to(torch.int16)}

        def decode(self, parts: Mapping[str, Tensor]) -> Tensor:
            return parts["values"].float()

    assert isinstance(find_codec("rounded"), Rounded)


def test_what_cannot_be_stored() -> None:
    with pytest.raises(UsageError, match=r"unknown codec 'int3': use one of bfloat16, .*int4, int8"):
        find_codec("int3")
    with pytest.raises(UsageError, match="int4 stores values in pairs and the hidden size is 25: use int8"):
        find_codec("int4").bytes_per_token(25)
