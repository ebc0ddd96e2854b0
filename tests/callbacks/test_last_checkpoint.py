import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, Trainer

from akl_lightning.callbacks import LastCheckpoint, last_checkpoint
from akl_lightning.cli import own_command
from akl_lightning.data.module import InstructionDataModule
from akl_lightning.errors import UsageError
from akl_lightning.module import DistillationModule
from tests.conftest import QUIET, gpt2


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


class CtrlC(Callback):
    """Press it in the middle of a step, or when training has ended."""

    def __init__(self, when: str) -> None:
        self.when = when

    def on_train_batch_start(self, trainer: Trainer, *_: Any) -> None:
        if self.when == "step" and trainer.global_step == 2:
            signal.raise_signal(signal.SIGINT)

    def on_train_end(self, *_: Any) -> None:
        if self.when == "end":
            signal.raise_signal(signal.SIGINT)


@pytest.mark.parametrize(("when", "step"), [("step", 3), ("end", 7)])
def test_ctrl_c_finishes_the_step_and_a_notebook_lives_on(
    when: str, step: int, data: InstructionDataModule, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    said: list[str] = []
    monkeypatch.setattr(last_checkpoint, "rank_zero_info", said.append)
    handler = signal.getsignal(signal.SIGINT)

    def fit(*callbacks: Callback, ckpt_path: Path | None = None) -> Trainer:
        last = LastCheckpoint(tmp_path)
        last.command = "python own.py"
        trainer = Trainer(**{**QUIET, "enable_checkpointing": True}, max_epochs=1, callbacks=[*callbacks, last])
        trainer.fit(DistillationModule(gpt2(16), gpt2(24)), data, ckpt_path=ckpt_path)
        return trainer

    with pytest.raises(SystemExit) as end:
        fit(CtrlC(when))
    assert end.value.code == 130
    assert f"after optimizer step {step}; go on with: python own.py --ckpt_path " in said[0]
    assert signal.getsignal(signal.SIGINT) is handler
    assert torch.load(tmp_path / "last.ckpt", weights_only=True)["global_step"] == step
    assert fit(ckpt_path=tmp_path / "last.ckpt").global_step == 7


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["recipes/own.py", "--a", "b c", "--ckpt_path", "last"], "python recipes/own.py --a 'b c'"),
        (["/venv/bin/akl", "fit", "--ckpt_path=old.ckpt", "--b", "1"], "akl fit --b 1"),
        (["/venv/bin/akl", "fit"], "akl fit"),
    ],
)
def test_the_command_that_goes_on(arguments: list[str], expected: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TORCHELASTIC_RUN_ID", raising=False)
    monkeypatch.setattr(sys, "argv", arguments)
    assert own_command() == expected
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "1")
    monkeypatch.setattr(sys, "argv", ["recipes/own.py"])
    assert own_command() == "torchrun ... recipes/own.py"


@pytest.mark.parametrize("command", [["-m", "akl_lightning.cli"], ["recipes/gpt2_distill.py"]])
def test_ctrl_c_during_the_imports_is_no_traceback(command: list[str]) -> None:
    """Sent when torch is there, which is long before the last import."""
    process = subprocess.Popen(
        [sys.executable, *command, "--help"], cwd=Path(__file__).parents[2], stderr=subprocess.PIPE, text=True
    )
    maps = Path(f"/proc/{process.pid}/maps")
    deadline = time.monotonic() + 60
    while "libtorch" not in maps.read_text() and time.monotonic() < deadline:
        time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=30)
    assert process.returncode in (-signal.SIGINT, 130), "what a shell calls 130"
    assert errors == "interrupted\n"
