"""However samples are split over processes and micro-batches, a step is the same step."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, Trainer
from transformers import PreTrainedTokenizerFast

from akl_lightning.parallel import FSDP2Strategy
from tests.conftest import QUIET
from tests.distributed.training import apart, data_of, launch, module_of, prepare, whole_state

OPTIMIZERS = ("sgd", "adamw")
SPLITS = {"8": (8, 1), "2 accumulated 4 times": (2, 4)}
"""Samples of a micro-batch and micro-batches of a step, on each of two processes."""


class Samples(Callback):
    """Which samples this rank has seen in training."""

    def __init__(self) -> None:
        self.seen: list[str] = []

    def on_train_batch_start(self, trainer: Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
        rows = zip(batch["input_ids"], batch["labels"], strict=True)
        self.seen += [str(ids[labels != -100].tolist()) for ids, labels in rows if (labels != -100).any()]


def fit(folder: Path, optimizer: str, batch_size: int, accumulate: int, **trainer: Any) -> tuple[Trainer, Samples]:
    samples = Samples()
    trainer_ = Trainer(
        **QUIET,
        max_epochs=3,
        gradient_clip_val=0.4,
        accumulate_grad_batches=accumulate,
        callbacks=[samples],
        **trainer,
    )
    trainer_.fit(module_of(folder, optimizer), data_of(folder, batch_size=batch_size))
    return trainer_, samples


def results(trainer: Trainer) -> dict[str, Any]:
    metrics = {name: float(value) for name, value in trainer.callback_metrics.items()}
    return {"weights": whole_state(trainer), "metrics": metrics}


def work(rank: int, folder: Path, strategy: str) -> None:
    for optimizer in OPTIMIZERS:
        for name, (batch_size, accumulate) in SPLITS.items():
            trainer, samples = fit(folder, optimizer, batch_size, accumulate, strategy=strategy, devices=2)
            found = results(trainer)
            if strategy == "fsdp2":
                assert isinstance(trainer.strategy, FSDP2Strategy)
                shares = [p.to_local().numel() / p.numel() for p in trainer.lightning_module.parameters()]
                assert shares and all(share == 0.5 for share in shares)
                teacher = trainer.lightning_module.teacher.model
                assert all(p.to_local().numel() == p.numel() / 2 and p.grad is None for p in teacher.parameters())
            if rank == 0:
                torch.save(found, folder / f"{strategy}, {optimizer}, {name}.pt")
            (folder / f"{strategy}, {optimizer}, {name}, rank {rank}.json").write_text(json.dumps(samples.seen))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, tokenizer: PreTrainedTokenizerFast) -> Path:
    folder = tmp_path_factory.mktemp("split")
    prepare(folder, tokenizer)
    return folder


@pytest.fixture(scope="module")
def whole(folder: Path) -> dict[str, dict[str, Any]]:
    """One process that takes a step's samples at once."""
    found = {}
    for optimizer in OPTIMIZERS:
        trainer, samples = fit(folder, optimizer, 16, 1)
        found[optimizer] = {**results(trainer), "seen": samples.seen}
    return found


def check(found: dict[str, Any], whole: dict[str, Any], optimizer: str) -> None:
    ours, theirs = found["weights"], whole["weights"]
    assert apart(ours, theirs) <= 1e-5
    if optimizer == "sgd":
        for name, value in theirs.items():
            assert (ours[name] - value).norm() <= 1e-5 * value.norm() + 1e-7, name
    for name, value in whole["metrics"].items():
        assert found["metrics"][name] == pytest.approx(value, rel=1e-5, abs=1e-6), name
    assert {"train/head_error", "val/tail_error", "train/loss_step"} <= found["metrics"].keys()


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_one_process_that_accumulates(folder: Path, whole: dict[str, Any], optimizer: str) -> None:
    trainer, samples = fit(folder, optimizer, 4, 4)
    check(results(trainer), whole[optimizer], optimizer)
    assert sorted(samples.seen) == sorted(whole[optimizer]["seen"])
    assert len(samples.seen) == 3 * 25


def test_another_batch_is_another_update(folder: Path, whole: dict[str, Any]) -> None:
    trainer, _ = fit(folder, "sgd", 8, 1)
    assert apart(results(trainer)["weights"], whole["sgd"]["weights"]) > 1e-3


PRECISIONS = ("bf16-mixed", "bf16-true")


def work_on_two(rank: int, folder: Path, strategy: str) -> None:
    work(rank, folder, strategy)
    for precision in PRECISIONS:
        trainer, _ = fit(folder, "sgd", 8, 1, strategy=strategy, devices=2, precision=precision)
        found = results(trainer)
        if rank == 0:
            torch.save(found, folder / f"{strategy}, {precision}.pt")


@pytest.fixture(scope="module", params=["ddp", "fsdp2"])
def strategy(folder: Path, request: pytest.FixtureRequest) -> str:
    """Behind which lies what two processes have done with it."""
    launch(work_on_two, folder, request.param)
    return request.param


def test_two_processes_in_lower_precision(folder: Path, strategy: str) -> None:
    start = {name: value.double() for name, value in module_of(folder).state_dict().items()}
    for precision in PRECISIONS:
        found = torch.load(folder / f"{strategy}, {precision}.pt")
        trainer, _ = fit(folder, "sgd", 16, 1, precision=precision)
        whole = results(trainer)
        moved = {name: value - start[name] for name, value in whole["weights"].items()}
        ours = {name: value - start[name] for name, value in found["weights"].items()}
        assert apart(ours, moved) <= 0.02
        assert found["metrics"]["val/divergence"] == pytest.approx(whole["metrics"]["val/divergence"], rel=0.02)


def test_two_processes(folder: Path, whole: dict[str, Any], strategy: str) -> None:
    for optimizer in OPTIMIZERS:
        for name in SPLITS:
            check(torch.load(folder / f"{strategy}, {optimizer}, {name}.pt"), whole[optimizer], optimizer)
            seen = [
                json.loads((folder / f"{strategy}, {optimizer}, {name}, rank {rank}.json").read_text())
                for rank in (0, 1)
            ]
            assert sorted(seen[0] + seen[1]) == sorted(whole[optimizer]["seen"]), "each sample once an epoch"
