"""A teacher with another tokenizer on two processes, and in a run that goes on: the weights are those of one run."""

from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, Trainer

from akl_lightning.callbacks import LastCheckpoint
from akl_lightning.module import DistillationModule
from akl_lightning.rollouts import OnPolicy, Sampling
from tests.conftest import QUIET, gpt2
from tests.distributed.training import OPTIMIZERS, apart, data_of, launch, prepare, whole_state
from tests.tokenizers.tiny import byte_level


@pytest.fixture
def folder(tmp_path: Path, tokenizer: Any) -> Path:
    prepare(tmp_path, tokenizer)
    other = byte_level(["h e", "Ġ a", "a g", "n e", "o u"], ["<stop>"])
    torch.manual_seed(5)
    gpt2(24, len(other), positions=128, layers=2).save_pretrained(tmp_path / "other")
    other.save_pretrained(tmp_path / "other")
    return tmp_path


def train(folder: Path, name: str, ranks: int, checkpoint: str | None = None, **settings: Any) -> Trainer:
    """Steps of eight samples, however many ranks share them."""
    on_policy = OnPolicy(0.6, Sampling(6), validation_samples=0) if settings.pop("on_policy", False) else None
    module = DistillationModule(
        str(folder / "student"), str(folder / "other"), optimizer=OPTIMIZERS["sgd"], packing=ranks > 1,
        on_policy=on_policy,
    )  # fmt: skip
    flags = {**QUIET, "max_epochs": 2, "devices": ranks, "accumulate_grad_batches": 2 // ranks, "logger": False}
    trainer = Trainer(**{**flags, **settings})
    trainer.fit(module, data_of(folder, batch_size=4), ckpt_path=checkpoint)
    state = whole_state(trainer)
    if trainer.is_global_zero:
        kept = ("val/", "train/rollout")
        means = {name: value.item() for name, value in trainer.callback_metrics.items() if name.startswith(kept)}
        torch.save({"weights": state, "means": means}, folder / f"{name}.pt")
    return trainer


def train_on_rank(rank: int, folder: Path, strategy: str) -> None:
    for on_policy in (False, True):
        train(folder, f"two, {on_policy}", 2, strategy=strategy, on_policy=on_policy)


class Breaks(Callback):
    """Ends a run behind its third step."""

    def on_train_batch_start(self, trainer: Trainer, *_: Any) -> None:
        if trainer.global_step == 3:
            raise RuntimeError("broken off")


@pytest.mark.parametrize("strategy", ["ddp", "fsdp2"])
def test_two_processes_train_as_one(folder: Path, strategy: str) -> None:
    launch(train_on_rank, folder, strategy)
    for on_policy in (False, True):
        train(folder, "one", 1, on_policy=on_policy)
        one, two = (torch.load(folder / f"{name}.pt") for name in ("one", f"two, {on_policy}"))
        assert apart(two["weights"], one["weights"]) < 1e-5
        assert two["means"] == pytest.approx(one["means"], rel=1e-4)
        assert 0 < two["means"]["val/aligned"] < 1
        assert not on_policy or 0 < two["means"]["train/rollout_aligned"] < 1


def test_a_run_that_goes_on_ends_as_one_that_was_never_broken_off(folder: Path) -> None:
    train(folder, "whole", 1)
    last = LastCheckpoint(folder / "checkpoints", every_n_steps=1)
    broken = {"callbacks": [last, Breaks()], "enable_checkpointing": True, "default_root_dir": str(folder)}
    with pytest.raises(RuntimeError, match="broken off"):
        train(folder, "begun", 1, **broken)
    train(folder, "resumed", 1, str(folder / "checkpoints/last.ckpt"))
    whole, resumed = (torch.load(folder / f"{name}.pt") for name in ("whole", "resumed"))
    assert apart(resumed["weights"], whole["weights"]) == 0 and resumed["means"] == whole["means"]
