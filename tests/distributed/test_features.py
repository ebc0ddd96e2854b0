"""An adapter and packed samples on two processes: the update and the export of one."""

from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Trainer
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from akl_lightning.callbacks import StudentExport
from akl_lightning.models.lora import LoraSettings
from tests.conftest import QUIET
from tests.distributed.training import apart, data_of, launch, module_of, prepare, whole_state

FEATURES: dict[str, dict[str, Any]] = {
    "packing": {"packing": True},
    "lora": {"lora": LoraSettings(rank=2, target_modules=["c_attn", "c_fc"])},
}


def fit(folder: Path, feature: str, export: Path, **trainer: Any) -> dict[str, torch.Tensor]:
    """How each weight has moved."""
    torch.manual_seed(9)  # of the adapter
    module = module_of(folder, "sgd", **FEATURES[feature])
    start = {name: value.double().clone() for name, value in module.state_dict().items()}
    trainer_ = Trainer(**QUIET, max_epochs=3, gradient_clip_val=0.4, callbacks=[StudentExport(str(export))], **trainer)
    trainer_.fit(module, data_of(folder, batch_size=16 // trainer_.world_size))
    return {name: value - start[name] for name, value in whole_state(trainer_).items()}


def on_two(rank: int, folder: Path, strategy: str) -> None:
    for feature in FEATURES:
        moved = fit(folder, feature, folder / f"{strategy}, {feature}", strategy=strategy, devices=2)
        if rank == 0:
            torch.save(moved, folder / f"{strategy}, {feature}.pt")


@pytest.mark.parametrize("strategy", ["ddp", "fsdp2"])
def test_the_update_and_the_export_are_those_of_one_process(
    tokenizer: PreTrainedTokenizerFast, tmp_path: Path, strategy: str
) -> None:
    prepare(tmp_path, tokenizer)
    launch(on_two, tmp_path, strategy)
    for feature in FEATURES:
        moved = fit(tmp_path, feature, tmp_path / feature)
        assert apart(torch.load(tmp_path / f"{strategy}, {feature}.pt"), moved) <= 1e-4
        one, two = (
            AutoModelForCausalLM.from_pretrained(tmp_path / name).state_dict()
            for name in (feature, f"{strategy}, {feature}")
        )
        assert all(torch.allclose(one[name], two[name], atol=1e-6) for name in one)
