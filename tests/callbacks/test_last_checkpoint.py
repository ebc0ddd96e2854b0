from pathlib import Path

import pytest
import torch
from lightning.pytorch import Trainer

from akl_lightning.callbacks import LastCheckpoint
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
