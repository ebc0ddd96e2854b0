"""A student with a LoRA adapter, teachers of other precisions, and the attention that both are loaded with."""

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from peft import AutoPeftModelForCausalLM
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from akl_lightning.callbacks import StudentExport
from akl_lightning.cli import main
from akl_lightning.data.module import InstructionDataModule
from akl_lightning.errors import UsageError
from akl_lightning.models.lora import LoraSettings
from akl_lightning.module import DistillationModule
from akl_lightning.teachers.live import LiveTeacher
from tests.conftest import QUIET, gpt2
from tests.test_module import Bigram, parameters, samples, stack

LORA = LoraSettings(rank=4, alpha=8)


@pytest.fixture
def folder(tmp_path: Path) -> str:
    """A student on disk."""
    torch.manual_seed(2)
    gpt2(16, layers=2).save_pretrained(tmp_path / "small")
    return str(tmp_path / "small")


def adapted(student: Any, **settings: Any) -> DistillationModule:
    torch.manual_seed(1)
    settings = {"lora": LORA, "optimizer": lambda parameters: torch.optim.AdamW(parameters, 1e-2), **settings}
    return DistillationModule(student, gpt2(24), **settings)


# --------------------------------------------------------------------------------------------------------------------
# LoRA


def test_only_the_adapter_learns(folder: str, data: InstructionDataModule) -> None:
    module = adapted(folder, lora=LoraSettings(rank=4, alpha=8, target_modules=["c_attn", "lm_head"]))
    before = {name: parameter.clone() for name, parameter in module.student.named_parameters()}
    (first,) = Trainer(**QUIET).validate(module, data, verbose=False)
    trainer = Trainer(**QUIET, max_epochs=4)
    trainer.fit(module, data)
    changed = {name for name, weight in module.student.named_parameters() if not torch.equal(weight, before[name])}
    assert changed == {name for name in before if "lora_" in name} and len(changed) == 6
    assert sum(len(group["params"]) for group in trainer.optimizers[0].param_groups) == 6
    assert all(4 in before[name].shape for name in changed), "the rank"
    assert trainer.callback_metrics["val/loss"] < first["val/loss"] - 0.1


def test_a_resumed_adapter_ends_like_one_that_never_stopped(
    folder: str, data: InstructionDataModule, tmp_path: Path
) -> None:
    lora = LoraSettings(rank=4, alpha=8, dropout=0.1)
    whole, resumed = adapted(folder, lora=lora), adapted(folder, lora=lora)
    Trainer(**QUIET, max_epochs=2).fit(whole, data)
    stopped = Trainer(**QUIET, max_epochs=1)
    stopped.fit(adapted(folder, lora=lora), data)
    stopped.save_checkpoint(tmp_path / "one.ckpt")
    Trainer(**QUIET, max_epochs=2).fit(resumed, data, ckpt_path=tmp_path / "one.ckpt")
    assert torch.equal(parameters(resumed.student), parameters(whole.student))


@pytest.mark.parametrize("merge", [True, False])
def test_it_is_exported_merged_or_as_an_adapter(
    merge: bool, folder: str, data: InstructionDataModule, tmp_path: Path
) -> None:
    module, export = adapted(folder), StudentExport(str(tmp_path / "student"), merge)
    best = ModelCheckpoint(tmp_path / "checkpoints", monitor="val/loss")
    callbacks = [export, best]
    Trainer(**{**QUIET, "enable_checkpointing": True}, max_epochs=2, callbacks=callbacks).fit(module, data)
    files = {file.name for file in export.exported.iterdir()}
    assert ("model.safetensors" in files) == merge and ("adapter_model.safetensors" in files) != merge
    assert "# A distilled language model" in (export.exported / "README.md").read_text()
    batch = {key: value for key, value in stack(samples()).items() if key != "labels"}
    expected = module.student.model.eval()(**batch).logits
    load = AutoModelForCausalLM if merge else AutoPeftModelForCausalLM
    for path in (export.exported, export.exported_best):  # the last one is the best
        assert torch.allclose(load.from_pretrained(path).eval()(**batch).logits, expected, atol=1e-5)
    plain = AutoModelForCausalLM.from_pretrained(folder)(**batch).logits
    assert (expected - plain).norm() > 0.01 * plain.norm()
    assert "lora_" in next(name for name, weight in module.student.named_parameters() if weight.requires_grad)


def test_what_cannot_be_adapted_or_exported_says_so(
    folder: str, data: InstructionDataModule, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    export = StudentExport(str(tmp_path / "student"), merge=False)
    with pytest.raises(UsageError, match="the adapter alone, the student has no folder to load it onto"):
        Trainer(**QUIET, callbacks=[export]).fit(adapted(gpt2(16)), data)
    with pytest.raises(
        UsageError, match=r"modules .*q_proj.* not found.*; set target_modules, the layers are c_attn, c_fc, c_proj, "
    ):
        adapted(folder, lora=LoraSettings(target_modules=["q_proj"]))
    with pytest.raises(UsageError, match=r"positive integer value but the value passed is 0\."):
        adapted(folder, lora=LoraSettings(rank=0))
    with pytest.raises(UsageError, match=r"model\.lora adapts transformers models, not a Bigram"):
        adapted(Bigram())
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(UsageError, match=r'model\.lora needs PEFT: pip install -e "\.\[peft\]"\.'):
        adapted(folder)


def test_from_the_command_line(
    folder: str, tokenizer_folder: str, corpus: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    arguments = {
        "--model.student": folder, "--model.teacher": folder, "--model.lora.rank": "2",
        "--model.lora.target_modules": "[c_fc]", "--model.teacher_precision": "bfloat16",
        "--data.tokenizer": tokenizer_folder, "--data.source": "JsonLines", "--data.source.path": corpus,
        "--data.max_length": "40", "--trainer.max_epochs": "1", "--trainer.accelerator": "cpu",
        "--trainer.logger": "false", "--trainer.callbacks": "StudentExport", "--trainer.callbacks.merge": "false",
    }  # fmt: skip
    monkeypatch.setattr(sys, "argv", ["akl", "fit", *(part for pair in arguments.items() for part in pair)])
    main()
    exported = AutoPeftModelForCausalLM.from_pretrained(tmp_path / "student")
    assert {name.split(".")[-4] for name, _ in exported.named_parameters() if "lora_" in name} == {"c_fc"}
    (checkpoint,) = tmp_path.rglob("*.ckpt")
    loaded = DistillationModule.load_from_checkpoint(checkpoint)
    weights = {name: weight for name, weight in loaded.student.named_parameters() if "lora_B" in name}
    assert len(weights) == 2 and all(weight.abs().max() > 0 for weight in weights.values())


# --------------------------------------------------------------------------------------------------------------------
# The teacher's precision, and the attention


@pytest.mark.parametrize("precision", ["bfloat16", "float16"])
def test_a_teacher_in_half_precision(precision: Any, folder: str) -> None:
    batch = stack(samples())
    torch.manual_seed(1)
    student = gpt2(16)
    exact = DistillationModule(student, folder).distill(batch)
    half = DistillationModule(student, folder, teacher_precision=precision)
    teacher = half.teacher.model.model
    assert teacher.dtype == getattr(torch, precision) and next(half.student.parameters()).dtype == torch.float32
    output = half.distill(batch)
    assert output.loss.item() == pytest.approx(exact.loss.item(), rel=0.01)
    assert not torch.equal(output.statistics["fkl"], exact.statistics["fkl"])
    output.loss.backward()
    assert all(parameter.grad.dtype == torch.float32 for parameter in half.student.parameters())


@pytest.mark.parametrize("precision", ["8bit", "4bit"])
def test_a_quantised_teacher(precision: Any, tmp_path: Path) -> None:
    pytest.importorskip("bitsandbytes")
    config = LlamaConfig(
        vocab_size=300, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=2, max_position_embeddings=64,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(tmp_path / "large")
    batch = stack(samples())
    exact = DistillationModule(gpt2(16), str(tmp_path / "large"))
    ours = DistillationModule(exact.student.model, str(tmp_path / "large"), teacher_precision=precision)
    layer = ours.teacher.model.model.model.layers[0].mlp.up_proj
    assert layer.weight.dtype == (torch.int8 if precision == "8bit" else torch.uint8)
    output = ours.distill(batch)
    assert output.loss.item() == pytest.approx(exact.distill(batch).loss.item(), rel=0.02)
    output.loss.backward()


def test_a_quantised_teacher_without_bitsandbytes(folder: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("akl_lightning.models.load.find_spec", lambda name: None)
    with pytest.raises(UsageError, match="4bit weights need bitsandbytes: pip install bitsandbytes accelerate"):
        DistillationModule(folder, folder, teacher_precision="4bit")
    with pytest.raises(UsageError, match="only a teacher in a folder or on the hub can be read in 4bit"):
        LiveTeacher({"model_type": "gpt2"}, precision="4bit")


def test_the_attention_is_that_of_both_models(folder: str) -> None:
    config = gpt2(16).config.to_dict()
    for student in (folder, config):
        for name in ("eager", "sdpa"):
            module = DistillationModule(student, folder, attn_implementation=name)
            assert module.student.config._attn_implementation == name
            assert module.teacher.model.config._attn_implementation == name
    for missing in ("flash_attention_2", "lightning"):
        with pytest.raises(UsageError, match=f"the student has no attn_implementation '{missing}' here: take sdpa"):
            DistillationModule(folder, folder, attn_implementation=missing)
        with pytest.raises(UsageError, match=f"the student has no attn_implementation '{missing}' here: take sdpa"):
            DistillationModule(config, folder, attn_implementation=missing)
