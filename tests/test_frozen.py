"""What is frozen and lies under the student's name is not in checkpoints, and found again."""

from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import EMAWeightAveraging, ModelCheckpoint, StochasticWeightAveraging
from peft import LoraConfig, get_peft_model

from akl_lightning.callbacks import StudentExport
from akl_lightning.data.module import InstructionDataModule
from akl_lightning.errors import UsageError
from akl_lightning.models.load import load_causal_lm
from akl_lightning.models.lora import LoraSettings
from akl_lightning.module import DistillationModule
from tests.conftest import QUIET, gpt2
from tests.test_module import parameters, samples, stack


@pytest.fixture
def folder(tmp_path: Path) -> str:
    torch.manual_seed(2)
    gpt2(16, layers=2).save_pretrained(tmp_path / "small")
    return str(tmp_path / "small")


def adapted(student: Any, **settings: Any) -> DistillationModule:
    torch.manual_seed(1)
    optimizer = {"optimizer": lambda parameters: torch.optim.AdamW(parameters, 1e-2)}
    return DistillationModule(student, gpt2(24), **{"lora": LoraSettings(rank=2), **optimizer, **settings})


def fit(module: DistillationModule, data: Any, epochs: int, **settings: Any) -> Trainer:
    trainer = Trainer(**QUIET, max_epochs=epochs, **{"limit_train_batches": 3, **settings})
    trainer.fit(module, data, ckpt_path=settings.pop("ckpt_path", None))
    return trainer


def go_on(module: DistillationModule, data: Any, path: Path, **settings: Any) -> Trainer:
    trainer = Trainer(**QUIET, max_epochs=2, limit_train_batches=3, **settings)
    trainer.fit(module, data, ckpt_path=path)
    return trainer


def alter(folder: str) -> None:
    """Another base: a number of it changes."""
    model = load_causal_lm(folder)
    with torch.no_grad():
        model.transformer.h[1].ln_1.weight[3] += 0.5
    model.save_pretrained(folder)


def read(path: Path) -> dict[str, Any]:
    return torch.load(path, weights_only=True)


def test_an_adapters_checkpoint_holds_the_adapter(folder: str, data: InstructionDataModule, tmp_path: Path) -> None:
    sizes = {}
    for save_frozen in (False, True):
        module = adapted(folder, save_frozen=save_frozen)
        fit(module, data, 1).save_checkpoint(path := tmp_path / f"{save_frozen}.ckpt", weights_only=True)
        frozen = {name for name, value in module.student.named_parameters() if not value.requires_grad}
        held = {name.removeprefix("student.") for name in read(path)["state_dict"] if name.startswith("student.")}
        assert held.isdisjoint(frozen) != save_frozen and any("lora_A" in name for name in held)
        sizes[save_frozen] = path.stat().st_size
    base = sum(parameter.numel() for parameter in load_causal_lm(folder).parameters())
    assert sizes[True] - sizes[False] > 0.7 * 4 * base


@pytest.mark.parametrize("save_frozen", [False, True])
@pytest.mark.parametrize("how", ["adapter", "adapter's folder", "layers", "half of the student"])
def test_a_resumed_run_ends_like_one_that_never_stopped(
    how: str, save_frozen: bool, folder: str, data: InstructionDataModule, tmp_path: Path
) -> None:
    def module() -> DistillationModule:
        student: Any = {"layers_of": folder, "keep": [1]} if how == "layers" else folder
        if how == "adapter's folder":
            torch.manual_seed(3)
            peft = get_peft_model(load_causal_lm(folder), LoraConfig(task_type="CAUSAL_LM", r=2))
            peft.save_pretrained(student := str(tmp_path / "adapter"))
        settings: dict[str, Any] = {} if how in ("adapter", "layers") else {"lora": None}
        made = adapted(student, save_frozen=save_frozen, **settings)
        if how == "half of the student":
            made.student.model.transformer.h[0].requires_grad_(False)
            made.student.model.transformer.wte.requires_grad_(False)
        return made

    whole, stopped, resumed = module(), module(), module()
    go_on(whole, data, None)
    fit(stopped, data, 1).save_checkpoint(path := tmp_path / "one.ckpt")
    assert ("left_out" in read(path)) != save_frozen
    go_on(resumed, data, path)
    assert torch.equal(parameters(resumed.student), parameters(whole.student))
    loaded = DistillationModule.load_from_checkpoint(path, teacher=gpt2(24))
    assert torch.equal(parameters(loaded.student), parameters(stopped.student))


@pytest.mark.parametrize("precision", ["bf16-true", "16-true"])
def test_the_precision_of_a_run_is_no_other_base(
    precision: Any, folder: str, data: InstructionDataModule, tmp_path: Path
) -> None:
    settings: dict[str, Any] = {"optimizer": lambda parameters: torch.optim.SGD(parameters, 1e-2)}
    fit(adapted(folder, **settings), data, 1, precision=precision).save_checkpoint(path := tmp_path / "one.ckpt")
    assert "left_out" in read(path)
    go_on(adapted(folder, **settings), data, path, precision=precision)
    Trainer(**QUIET, precision=precision).validate(adapted(folder), data, ckpt_path=path, verbose=False)
    loaded = DistillationModule.load_from_checkpoint(path, teacher=gpt2(24))
    # A second fit begins with weights that are rounded: they are no longer those of the folder.
    module = adapted(folder, **settings)
    fit(module, data, 1, precision=precision)
    fit(module, data, 1, precision=precision).save_checkpoint(tmp_path / "two.ckpt")
    assert not any("ln_1" in name for name in read(tmp_path / "two.ckpt").get("left_out", {}) if "weight" not in name)
    assert loaded.student.model.dtype == torch.float32


def test_another_base_is_refused(folder: str, data: InstructionDataModule, tmp_path: Path) -> None:
    fit(adapted(folder), data, 1).save_checkpoint(path := tmp_path / "one.ckpt")
    fit(adapted(folder, save_frozen=True), data, 1).save_checkpoint(whole := tmp_path / "whole.ckpt")
    alter(folder)
    match = r"the checkpoint leaves out weights that were frozen, and the student's are others, they differ in .*h\.1\."
    with pytest.raises(UsageError, match=match):
        go_on(adapted(folder), data, path)
    with pytest.raises(UsageError, match=match):
        Trainer(**QUIET).validate(adapted(folder), data, ckpt_path=path, verbose=False)
    with pytest.raises(UsageError, match=match):
        DistillationModule.load_from_checkpoint(path, teacher=gpt2(24))
    with pytest.raises(UsageError, match="the checkpoint is of another student, they differ in"):
        go_on(adapted(gpt2(16, layers=1)), data, path)
    # One that holds all of it, as those of earlier versions, goes on, and what the folder lacks is held from there on.
    trainer = go_on(module := adapted(folder), data, whole)
    trainer.save_checkpoint(later := tmp_path / "later.ckpt")
    held, left_out = read(later)["state_dict"], read(later)["left_out"]
    assert [name for name in held if "h.1.ln_1.weight" in name] and not [n for n in left_out if "h.1.ln_1.weight" in n]
    assert left_out
    loaded = DistillationModule.load_from_checkpoint(later, teacher=gpt2(24))
    assert torch.equal(parameters(loaded.student), parameters(module.student))


def test_what_was_trained_is_kept_though_it_is_frozen_again(
    folder: str, data: InstructionDataModule, tmp_path: Path
) -> None:
    class Thaws(Callback):
        def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
            block = pl_module.student.model.get_base_model().transformer.h[0].requires_grad_(True)
            trainer.optimizers[0].param_groups[0]["params"] += block.ln_1.parameters()

        def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
            pl_module.student.model.get_base_model().transformer.h[0].requires_grad_(False)

    module = adapted(folder)
    fit(module, data, 1, callbacks=[Thaws()]).save_checkpoint(path := tmp_path / "one.ckpt")
    assert any("h.0.ln_1.weight" in name for name in read(path)["state_dict"])
    assert any("h.1.ln_1.weight" in name for name in read(path)["left_out"])
    loaded = DistillationModule.load_from_checkpoint(path, teacher=gpt2(24))
    assert torch.equal(parameters(loaded.student), parameters(module.student))


def test_a_module_is_kept_whole(folder: str, data: InstructionDataModule, tmp_path: Path) -> None:
    student = get_peft_model(load_causal_lm(folder), LoraConfig(task_type="CAUSAL_LM", r=2))
    for source in (student, {**gpt2(16).config.to_dict()}):
        module = adapted(source, lora=None) if source is student else adapted(source)
        fit(module, data, 1).save_checkpoint(path := tmp_path / "one.ckpt")
        assert "left_out" not in read(path) and any("wte" in name for name in read(path)["state_dict"])


def test_the_best_student_is_exported_whole(folder: str, data: InstructionDataModule, tmp_path: Path) -> None:
    best = ModelCheckpoint(tmp_path / "checkpoints", monitor="val/loss")
    up = {"optimizer": lambda parameters: torch.optim.SGD(parameters, 0.3, maximize=True)}
    module, export = adapted(folder, **up), StudentExport(str(tmp_path / "student"))
    settings = {**QUIET, "enable_checkpointing": True}
    Trainer(**settings, max_epochs=2, callbacks=[export, best]).fit(module, data)
    assert "left_out" in read(best.best_model_path) and "epoch=0" in best.best_model_path
    loaded = DistillationModule.load_from_checkpoint(best.best_model_path, teacher=gpt2(24))
    rows = {name: value for name, value in stack(samples()).items() if name != "labels"}
    expected = loaded.student.model.eval()(**rows).logits
    assert torch.allclose(load_causal_lm(str(export.exported_best)).eval()(**rows).logits, expected, atol=1e-5)
    last = load_causal_lm(str(export.exported)).eval()(**rows).logits
    assert not torch.allclose(last, expected, atol=1e-5)


@pytest.mark.parametrize("average", [lambda: EMAWeightAveraging(decay=0.5), lambda: StochasticWeightAveraging(1e-2, 1)])
def test_averaged_adapters_go_on(average: Any, folder: str, data: InstructionDataModule, tmp_path: Path) -> None:
    whole, resumed = adapted(folder), adapted(folder)
    kept = ModelCheckpoint(tmp_path, save_top_k=-1, filename="{epoch}")
    settings = {**QUIET, "enable_checkpointing": True, "max_epochs": 3}
    Trainer(**settings, callbacks=[average(), kept]).fit(whole, data)
    path = tmp_path / "epoch=1.ckpt"
    assert "left_out" in read(path)
    Trainer(**QUIET, max_epochs=3, callbacks=[average()]).fit(resumed, data, ckpt_path=path)
    assert torch.allclose(parameters(resumed.student), parameters(whole.student), atol=1e-6)
    assert not torch.equal(parameters(whole.student), parameters(adapted(folder).student))
