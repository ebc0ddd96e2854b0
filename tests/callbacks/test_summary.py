import re
from pathlib import Path

import pytest
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.demos.boring_classes import BoringModel

from akl_lightning.callbacks import DistillationSummary, LastCheckpoint
from akl_lightning.criterion import DistillationCriterion
from akl_lightning.data.module import InstructionDataModule
from akl_lightning.errors import UsageError
from akl_lightning.module import DistillationModule
from tests.conftest import QUIET, gpt2, write


def printed(capsys: pytest.CaptureFixture[str]) -> str:
    return re.sub(r"[ \n]+", " ", capsys.readouterr().out)


def test_models_before_and_results_after(
    data: InstructionDataModule,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    # A folder's name may look like rich's markup.
    best, last = ModelCheckpoint("[b]best", monitor="val/fkl"), LastCheckpoint("last")
    settings = {**QUIET, "enable_checkpointing": True, "enable_model_summary": True}
    student, teacher = gpt2(16), gpt2(24)
    student.transformer.wpe.requires_grad_(False)
    trainer = Trainer(**settings, max_epochs=2, callbacks=[DistillationSummary(), best, last])
    trainer.fit(DistillationModule(student, teacher), data)
    sizes = [sum(parameter.numel() for parameter in model.parameters()) for model in (teacher, student)]
    trained = sizes[1] - student.transformer.wpe.weight.numel()
    output = printed(capsys)
    assert f"teacher GPT2LMHeadModel {sizes[0]:,} 0 (frozen)" in output
    assert f"student GPT2LMHeadModel {sizes[1]:,} {trained:,}" in output
    assert f"compression ratio {sizes[0] / sizes[1]:.2f}: the teacher's parameters by the student's" in output
    assert "[bold]" not in output, "markup that is shown as it is"
    assert "Trained 2 epochs, 14 optimizer steps, in 0:00:0" in output
    for figure in ("loss", "divergence", "head error", "tail error", "head weight"):
        name = figure.replace(" ", "_")
        train, val = (f"{trainer.callback_metrics[f'{stage}/{name}']:.4f}" for stage in ("train", "val"))
        assert f" {figure} {train} {val}" in output
    assert output.index("compression") < output.index("Trained") < output.index("head error")
    assert f"best val/fkl {best.best_model_score:.4f}: [b]best/{Path(best.best_model_path).name}" in output
    assert "last checkpoint: last/last.ckpt" in output


def test_a_cached_teacher_and_none(
    data: InstructionDataModule,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    gpt2(24).save_pretrained("large")
    cache = write("large", Path("cache"), data)
    settings = {**QUIET, "enable_model_summary": True}
    Trainer(**settings, max_epochs=1, callbacks=[DistillationSummary()]).fit(DistillationModule(gpt2(16), cache), data)
    output = printed(capsys)
    assert "teacher large, cached (int8) not loaded 0 (frozen)" in output and "compression" not in output
    alone = DistillationModule(gpt2(16), criterion=DistillationCriterion(alpha=0.0))
    Trainer(**settings, max_epochs=1, callbacks=[DistillationSummary()]).fit(alone, data)
    output = printed(capsys)
    assert "teacher" not in output and "student GPT2LMHeadModel" in output and "cross entropy" in output


def test_misuse_is_reported_before_training(tmp_path: Path) -> None:
    settings = {**QUIET, "enable_model_summary": True}
    with pytest.raises(UsageError, match="DistillationSummary needs a DistillationModule: use ModelSummary for others"):
        Trainer(**settings, default_root_dir=tmp_path, callbacks=[DistillationSummary()]).fit(BoringModel())
