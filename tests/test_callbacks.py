import csv
from pathlib import Path

import pytest
import torch
from lightning.pytorch import Trainer
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from transformers import AutoModelForCausalLM, AutoTokenizer

from akl_lightning.callbacks import AdaptiveWeightMonitor, HeadTailPlot, LastCheckpoint, StudentExport, draw_head_tail
from akl_lightning.criterion import DistillationCriterion
from akl_lightning.data.module import InstructionDataModule
from akl_lightning.errors import UsageError
from akl_lightning.module import DistillationModule
from tests.conftest import QUIET, gpt2
from tests.test_module import Bigram


def test_the_weight_goes_to_every_logger(data: InstructionDataModule, tmp_path: Path) -> None:
    loggers = [TensorBoardLogger(tmp_path, "tb", ""), CSVLogger(tmp_path, "csv", "")]
    trainer = Trainer(**{**QUIET, "logger": loggers}, max_epochs=2, callbacks=[AdaptiveWeightMonitor(every_n_steps=3)])
    trainer.fit(DistillationModule(gpt2(16), gpt2(24)), data)
    events = EventAccumulator(str(tmp_path / "tb"), {"histograms": 0}).Reload()  # 0: keep them all
    points = events.Scalars("train/head_weight_step")
    assert [point.step for point in points] == [3, 6, 9, 12]
    assert all(0 < point.value < 1 for point in points)
    histograms = events.Histograms("train/head_weight_per_token")
    assert [histogram.step for histogram in histograms] == [3, 6, 9, 12]
    assert all(h.histogram_value.min >= 0 and h.histogram_value.max <= 1 for h in histograms)
    with (tmp_path / "csv" / "metrics.csv").open() as lines:
        written = [
            float(row["train/head_weight_step"]) for row in csv.DictReader(lines) if row["train/head_weight_step"]
        ]
    assert written == pytest.approx([point.value for point in points], rel=1e-5)


def test_the_plot_has_a_point_per_epoch_and_goes_on_after_a_resume(data: InstructionDataModule, tmp_path: Path) -> None:
    def fit(epochs: int, checkpoint: Path | None = None) -> HeadTailPlot:
        plot = HeadTailPlot(str(tmp_path))
        trainer = Trainer(**QUIET, max_epochs=epochs, callbacks=[plot])
        trainer.fit(DistillationModule(gpt2(16), gpt2(24)), data, ckpt_path=checkpoint)
        trainer.save_checkpoint(tmp_path / "last.ckpt")
        return plot

    fit(2)
    plot = fit(4, tmp_path / "last.ckpt")
    assert plot.path == tmp_path / "head_tail_error.png"
    assert plot.path.read_bytes().startswith(b"\x89PNG")
    assert set(plot.history) == {f"{s}/{part}_error" for s in ("train", "val") for part in ("head", "tail")}
    assert all([epoch for epoch, _ in points] == [1, 2, 3, 4] for points in plot.history.values())

    (axes,) = draw_head_tail(plot.history).axes
    assert axes.get_xlabel() == "epoch" and "|p - q|" in axes.get_ylabel()
    assert {line.get_label() for line in axes.lines} == {
        f"{part} error, {stage}" for part in ("head", "tail") for stage in ("training", "validation")
    }
    assert all(len(line.get_xdata()) == 4 for line in axes.lines)


def test_the_exported_student_loads_and_answers_alike(data: InstructionDataModule, tmp_path: Path) -> None:
    (tmp_path / "student").mkdir()
    (tmp_path / "student" / "mine").write_text("precious")
    export = StudentExport(str(tmp_path / "student"))
    module = DistillationModule(gpt2(16), gpt2(24))
    Trainer(**QUIET, max_epochs=1, callbacks=[export]).fit(module, data)
    assert (tmp_path / "student" / "mine").read_text() == "precious"
    assert export.exported == tmp_path / "student-v1"
    batch = AutoTokenizer.from_pretrained(export.exported)("Say one", return_tensors="pt")
    student = AutoModelForCausalLM.from_pretrained(export.exported)
    assert torch.equal(student(**batch).logits, module.student.model.eval()(**batch).logits)


def test_misuse_is_reported_before_training(data: InstructionDataModule) -> None:
    plain = DistillationModule(gpt2(16), criterion=DistillationCriterion(alpha=0.0))
    for callback in (AdaptiveWeightMonitor(), HeadTailPlot()):
        with pytest.raises(UsageError, match="needs a DistillationModule with a teacher: remove the callback"):
            Trainer(**QUIET, callbacks=[callback]).fit(plain, data)
    with pytest.raises(UsageError, match="AdaptiveWeightMonitor needs a logger"):
        Trainer(**QUIET, callbacks=[AdaptiveWeightMonitor()]).fit(DistillationModule(gpt2(16), gpt2(24)), data)
    with pytest.raises(UsageError, match="StudentExport cannot write a Bigram, only transformers models"):
        Trainer(**QUIET, callbacks=[StudentExport()]).fit(DistillationModule(Bigram(), gpt2(24)), data)
    with pytest.raises(UsageError, match="every_n_steps must be 1 or more, got 0"):
        AdaptiveWeightMonitor(0)


def test_the_last_checkpoint_of_another_run_is_never_overwritten(data: InstructionDataModule, tmp_path: Path) -> None:
    def fit(epochs: int, ckpt_path: Path | None = None) -> None:
        settings = {**QUIET, "enable_checkpointing": True, "callbacks": [LastCheckpoint(tmp_path)]}
        Trainer(**settings, max_epochs=epochs).fit(DistillationModule(gpt2(16), gpt2(24)), data, ckpt_path=ckpt_path)

    fit(1)
    before = (tmp_path / "last.ckpt").read_bytes()
    with pytest.raises(UsageError, match=r"last.ckpt is another run's and is never overwritten: go on from it"):
        fit(1)
    assert (tmp_path / "last.ckpt").read_bytes() == before
    fit(2, tmp_path / "last.ckpt")
    assert torch.load(tmp_path / "last.ckpt", weights_only=True)["epoch"] == 1
