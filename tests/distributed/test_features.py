"""Adapters and packed samples on two processes: the update and the export of one."""

from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Trainer
from peft import PromptTuningConfig, get_peft_model
from transformers import PreTrainedTokenizerFast

from akl_lightning.callbacks import StudentExport
from akl_lightning.criterion import DistillationCriterion
from akl_lightning.divergences import ReverseKL
from akl_lightning.models.load import load_causal_lm
from akl_lightning.models.lora import LoraSettings
from tests.conftest import QUIET
from tests.distributed.training import apart, data_of, launch, module_of, prepare, whole_state

LORA = LoraSettings(rank=2, target_modules=["c_attn", "c_fc"])
FEATURES: dict[str, dict[str, Any]] = {
    "packing": {"packing": True},
    "lora": {"lora": LORA},
    "base": {"lora": LORA, "teacher": "base", "criterion": DistillationCriterion(ReverseKL(), alpha=0.5)},
    "prompts": {},
}


def student_of(folder: Path, feature: str) -> Any:
    if feature != "prompts":
        return str(folder / "student")
    prompts = PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4)
    return get_peft_model(load_causal_lm(str(folder / "student")), prompts)


def fit(folder: Path, feature: str, export: Path, **trainer: Any) -> dict[str, torch.Tensor]:
    """How each weight has moved."""
    torch.manual_seed(9)  # of the adapter
    module = module_of(folder, "sgd", student=student_of(folder, feature), **FEATURES[feature])
    start = {name: value.double().clone() for name, value in module.state_dict().items()}
    callbacks = [StudentExport(str(export), merge=feature != "prompts")]
    trainer_ = Trainer(**QUIET, max_epochs=3, gradient_clip_val=0.4, callbacks=callbacks, **trainer)
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
        one, two = (load_causal_lm(str(tmp_path / name)).state_dict() for name in (feature, f"{strategy}, {feature}"))
        assert all(torch.allclose(one[name], two[name], atol=1e-6) for name in one)


def fit_adapter(folder: Path, epochs: int, ckpt_path: Path | None = None, **trainer: Any) -> Trainer:
    torch.manual_seed(9)
    trainer_ = Trainer(**QUIET, max_epochs=epochs, **trainer)
    module, data = module_of(folder, lora=LORA), data_of(folder, batch_size=16 // trainer_.world_size)
    trainer_.fit(module, data, ckpt_path=ckpt_path)
    return trainer_


def go_on_two(rank: int, folder: Path, strategy: str) -> None:
    settings = {"strategy": strategy, "devices": 2}
    fit_adapter(folder, 1, **settings).save_checkpoint(folder / "of two.ckpt")
    weights = whole_state(fit_adapter(folder, 2, folder / "of one.ckpt", **settings))
    if rank == 0:
        torch.save(weights, folder / "one then two.pt")


@pytest.mark.parametrize("strategy", ["ddp", "fsdp2"])
def test_a_checkpoint_without_the_frozen_base_goes_on_anywhere(
    tokenizer: PreTrainedTokenizerFast, tmp_path: Path, strategy: str
) -> None:
    prepare(tmp_path, tokenizer)
    undisturbed = whole_state(fit_adapter(tmp_path, 2))
    fit_adapter(tmp_path, 1).save_checkpoint(tmp_path / "of one.ckpt")
    launch(go_on_two, tmp_path, strategy)
    of_one, of_two = (torch.load(tmp_path / name, weights_only=True) for name in ("of one.ckpt", "of two.ckpt"))
    assert of_one["left_out"] == of_two["left_out"] and len(of_one["left_out"]) > 10
    assert of_one["state_dict"].keys() == of_two["state_dict"].keys() and len(of_one["state_dict"]) == 8
    assert apart(whole_state(fit_adapter(tmp_path, 2, tmp_path / "of two.ckpt")), undisturbed) <= 1e-5
    assert apart(torch.load(tmp_path / "one then two.pt"), undisturbed) <= 1e-5
