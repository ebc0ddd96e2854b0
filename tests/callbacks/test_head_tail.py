from pathlib import Path

import pytest
from lightning.pytorch import Trainer

from akl_lightning.callbacks import HeadTailPlot, draw_head_tail
from akl_lightning.data.module import InstructionDataModule
from akl_lightning.errors import UsageError
from akl_lightning.module import DistillationModule
from tests.conftest import QUIET, gpt2


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


def test_a_validation_of_its_own_draws_nothing_and_what_lies_in_the_folder_stays(
    data: InstructionDataModule, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    one = Trainer(**QUIET, max_epochs=1, callbacks=[HeadTailPlot(str(tmp_path / "one"))])
    one.fit(DistillationModule(gpt2(16), gpt2(24)), data)
    one.save_checkpoint(tmp_path / "one.ckpt")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "head_tail_error.png").write_text("another's")
    plot, module = HeadTailPlot(), DistillationModule(gpt2(16), gpt2(24))
    trainer = Trainer(**QUIET, max_epochs=1, callbacks=[plot], default_root_dir=tmp_path / "two")
    trainer.validate(module, data, ckpt_path=tmp_path / "one.ckpt", verbose=False)
    assert plot.path is None
    trainer.fit(module, data)
    assert plot.path == tmp_path / "two/head_tail_error.png" and plot.path.is_file()
    assert (tmp_path / "head_tail_error.png").read_text() == "another's"


def test_a_folder_that_cannot_be_written_to_is_named_before_training(
    data: InstructionDataModule, tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("mine")
    with pytest.raises(UsageError, match=r"cannot write to .*file/plots: Not a directory; choose another folder"):
        trainer = Trainer(**QUIET, callbacks=[HeadTailPlot(str(tmp_path / "file/plots"))])
        trainer.fit(DistillationModule(gpt2(16), gpt2(24)), data)
    assert (tmp_path / "file").read_text() == "mine"
