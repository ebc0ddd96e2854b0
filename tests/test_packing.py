"""Samples laid into fewer rows: the same losses, gradients, students and cached teachers as one sample to a row."""

import copy
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from lightning.pytorch import Trainer
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM

from akl_lightning.data.module import InstructionDataModule
from akl_lightning.errors import UsageError
from akl_lightning.models.packing import pack
from akl_lightning.models.split import SplitModel
from akl_lightning.module import DistillationModule
from tests.conftest import QUIET, Bigram, gpt2, write
from tests.test_models import FAMILIES, build, loss_and_gradients


def batch(lengths: list[int], left: bool = False) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1)
    longest = max(*lengths, 1)
    mask = torch.tensor([[1] * length + [0] * (longest - length) for length in lengths])
    mask = mask.flip(-1) if left else mask
    ids = torch.randint(1, 60, mask.shape, generator=generator)
    return {"input_ids": ids, "attention_mask": mask, "labels": ids.masked_fill(mask == 0, -100)}


@given(st.lists(st.integers(0, 12), min_size=1, max_size=9), st.booleans())
def test_each_token_is_once_in_the_rows_and_samples_stay_whole(lengths: list[int], left: bool) -> None:
    rows = batch(lengths, left)
    packed = pack(rows)
    mask = rows["attention_mask"].bool()
    places = packed.places[mask]
    assert len(places.unique()) == mask.sum()
    assert torch.equal(packed.input_ids.flatten()[places], rows["input_ids"][mask])
    width = packed.input_ids.shape[1]
    assert len(packed.input_ids) <= len(lengths) and width == max(*lengths, 1)
    # No row could be poured whole into another one.
    filled = torch.zeros(len(packed.input_ids) * width).index_fill_(0, places, 1).view(-1, width).sum(-1)
    assert len(filled) == 1 or filled.sort().values[:2].sum() > width or filled.sum() == 0
    for sample, length in enumerate(lengths):
        own = packed.places[sample][mask[sample]]
        assert torch.equal(own - own[:1], torch.arange(length)) and len((own // width).unique()) <= 1
        assert packed.position_ids.flatten()[own].tolist() == list(range(length))


@pytest.mark.parametrize("family", FAMILIES)
def test_samples_in_a_row_see_nothing_of_each_other(family: str) -> None:
    model, rows = build(family).train(), batch([3, 17, 9, 1, 6, 12, 2])
    loss, gradients = loss_and_gradients(SplitModel(model), rows)
    seen: list[torch.Size] = []
    model.base_model.register_forward_pre_hook(
        lambda _, args, kwargs: seen.append((args[0] if args else kwargs["input_ids"]).shape), with_kwargs=True
    )
    packed_loss, packed_gradients = loss_and_gradients(SplitModel(model, packing=True), rows)
    assert seen[-1] == (3, 17)
    assert torch.allclose(packed_loss, loss, rtol=1e-5)
    for name, gradient in gradients.items():
        assert (packed_gradients[name] - gradient).norm() <= 1e-4 * gradient.norm() + 1e-6, name


def train(data: InstructionDataModule, teacher: object, packing: bool) -> Tensor:
    torch.manual_seed(3)
    module = DistillationModule(
        gpt2(16), teacher, packing=packing, optimizer=lambda parameters: torch.optim.SGD(parameters, 0.1)
    )
    Trainer(**QUIET, max_epochs=2, gradient_clip_val=1.0).fit(module, data)
    return nn.utils.parameters_to_vector(module.student.parameters()).detach()


def test_a_run_ends_with_the_same_student_from_a_live_and_a_cached_teacher(
    data: InstructionDataModule, tmp_path: Path
) -> None:
    teacher = gpt2(24)
    cached = write(teacher, tmp_path / "cache", data, codec="bfloat16")
    for source in (teacher, cached):
        padded, packed = (train(data, copy.deepcopy(source), packing) for packing in (False, True))
        assert (packed - padded).norm() <= 1e-5 * padded.norm()


def test_a_model_that_cannot_is_named(data: InstructionDataModule) -> None:
    config = {"vocab_size": 300, "hidden_size": 16, "state_size": 4, "num_hidden_layers": 1}
    recurrent = AutoModelForCausalLM.from_config(AutoConfig.for_model("mamba", **config))
    module = DistillationModule(recurrent, gpt2(16), packing=True)
    with pytest.raises(
        UsageError, match=r"MambaForCausalLM does not tell samples in one row apart: set model\.packing"
    ):
        Trainer(**QUIET, max_epochs=1).fit(module, data)

    with pytest.raises(UsageError, match="Bigram does not tell samples in one row apart"):
        Trainer(**QUIET, max_epochs=1).fit(DistillationModule(Bigram(), gpt2(16), packing=True), data)
