import re
from pathlib import Path
from typing import Any

import pytest
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.demos.boring_classes import BoringModel

from akl_lightning.callbacks import DistillationProgressBar, progress
from akl_lightning.criterion import DistillationCriterion
from akl_lightning.data.module import InstructionDataModule
from akl_lightning.errors import UsageError
from akl_lightning.module import DistillationModule
from tests.conftest import QUIET, gpt2

LOUD = {name: value for name, value in QUIET.items() if name != "enable_progress_bar"}


class Recorder(DistillationProgressBar):
    """Keeps what it shows, and reads at every batch."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[dict[str, Any]] = []
        self.tokens: list[int] = []

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)
        self.seen.append(dict(self._shown))
        self.tokens.append(int(batch["attention_mask"].sum()))


def test_loss_weight_and_speed_stand_beside_the_bar(
    data: InstructionDataModule, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(progress, "_LOOK_EVERY_SECONDS", 0.0)
    seconds = iter(range(10**6))
    monkeypatch.setattr(progress.time, "monotonic", lambda: float(next(seconds)))
    bar = Recorder()
    trainer = Trainer(**LOUD, max_epochs=1, callbacks=[bar])
    trainer.fit(DistillationModule(gpt2(16), gpt2(24)), data)
    assert len(bar.seen) == 7
    for shown, tokens in zip(bar.seen, bar.tokens, strict=True):
        assert list(shown) == ["loss", "head weight", "tokens/s"]
        assert 0 < shown["head weight"] < 1 and shown["loss"] > 0
        assert shown["tokens/s"] == f"{tokens:,}"  # the clock is looked at once before a batch and once after it
    assert bar.seen[-1]["loss"] == pytest.approx(trainer.callback_metrics["train/loss_step"].item())
    drawn = " ".join(capsys.readouterr().out.split())
    assert re.search(r"7/7 .* loss: \d.* head weight: 0\.\d+ tokens/s: \d+", drawn)


def test_the_end_of_an_epoch_is_shown_however_fast_it_was(
    data: InstructionDataModule, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(progress, "_LOOK_EVERY_SECONDS", 1e9)
    bar = Recorder()
    trainer = Trainer(**LOUD, max_epochs=2, callbacks=[bar])
    trainer.fit(DistillationModule(gpt2(16), gpt2(24)), data)
    first, *between, end = bar.seen[7:]
    assert all(shown == first for shown in between), "read at the end of the epoch before"
    assert end["loss"] == pytest.approx(trainer.callback_metrics["train/loss_step"].item()) != first["loss"]


def test_without_a_teacher_there_is_no_weight(data: InstructionDataModule) -> None:
    bar = Recorder()
    trainer = Trainer(**LOUD, max_epochs=1, callbacks=[bar])
    trainer.fit(DistillationModule(gpt2(16), criterion=DistillationCriterion(alpha=0.0)), data)
    assert list(bar.seen[-1]) == ["loss", "tokens/s"]


@pytest.mark.parametrize(
    ("limits", "said"),
    [
        ({"max_steps": 2}, "Epoch 0 "),
        ({"max_epochs": -1, "max_steps": 2}, "Epoch 0 "),
        ({"max_epochs": 1}, "Epoch 0/0 "),
    ],
)
def test_a_run_that_its_steps_end_has_no_number_of_epochs(
    data: InstructionDataModule, capsys: pytest.CaptureFixture[str], limits: dict[str, int], said: str
) -> None:
    Trainer(**LOUD, **limits, callbacks=[DistillationProgressBar()]).fit(DistillationModule(gpt2(16), gpt2(24)), data)
    drawn = capsys.readouterr().out
    assert said in drawn and "/-2" not in drawn


def test_the_speed_does_not_count_validation(data: InstructionDataModule, monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])

    class Slow(DistillationModule):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            now[0] += 1
            return super().training_step(batch, batch_idx)

        def validation_step(self, batch: Any, batch_idx: int) -> Any:
            now[0] += 1000
            return super().validation_step(batch, batch_idx)

    bar = Recorder()
    Trainer(**LOUD, max_epochs=2, val_check_interval=3, callbacks=[bar]).fit(Slow(gpt2(16), gpt2(24)), data)
    assert [shown["tokens/s"] for shown in bar.seen] == [f"{tokens:,}" for tokens in bar.tokens]


def test_misuse_is_reported_before_training(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="DistillationProgressBar needs a DistillationModule: use RichProgressBar"):
        Trainer(**LOUD, default_root_dir=tmp_path, callbacks=[DistillationProgressBar()]).fit(BoringModel())
