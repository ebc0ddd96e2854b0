"""Training runs for other processes: ``python -m tests.distributed.training SETTINGS.json``, or :func:`launch`."""

import json
import os
import socket
import stat
import sys
import time
from collections.abc import Callable
from functools import partial
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, Trainer, seed_everything
from lightning.pytorch.loggers import TensorBoardLogger

from akl_lightning.callbacks import (
    AdaptiveWeightMonitor,
    DistributionPlot,
    HeadTailPlot,
    HeadWeightMap,
    LastCheckpoint,
    SampledAnswers,
    StudentExport,
)
from akl_lightning.cli import run_command
from akl_lightning.data.module import InstructionDataModule
from akl_lightning.data.sources import JsonLines
from akl_lightning.module import DistillationModule
from tests.conftest import PAIRS, QUIET, gpt2


def prepare(folder: Path, tokenizer: Any) -> None:
    """What all runs in a folder share: pairs, tokenizer, teacher, student."""
    (folder / "pairs.jsonl").write_text("".join(json.dumps(pair) + "\n" for pair in PAIRS))
    tokenizer.save_pretrained(folder / "tokenizer")
    for name, width in (("teacher", 24), ("student", 16)):
        torch.manual_seed(width)
        model = gpt2(width, len(tokenizer), layers=2)
        model.save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)


OPTIMIZERS = {"sgd": partial(torch.optim.SGD, lr=0.5), "adamw": partial(torch.optim.AdamW, lr=1e-2)}


def module_of(folder: Path, optimizer: str = "adamw", **settings: Any) -> DistillationModule:
    models = {"student": str(folder / "student"), "teacher": str(folder / "teacher")}
    return DistillationModule(**{**models, "optimizer": OPTIMIZERS[optimizer], **settings})


def data_of(folder: Path, **settings: Any) -> InstructionDataModule:
    """25 training samples: with steps of 16 the last one is short, and of its micro-batches of 2 × 2 one has one."""
    source = JsonLines(str(folder / "pairs.jsonl"))
    defaults = {"batch_size": 16, "max_length": 40, "validation_size": 6, "test_size": 5}
    return InstructionDataModule(str(folder / "tokenizer"), source, **{**defaults, **settings})


def whole_state(trainer: Trainer) -> dict[str, torch.Tensor]:
    """The student's weights, gathered; complete on rank 0."""
    return {name: value.double() for name, value in trainer.strategy.lightning_module_state_dict().items()}


def apart(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> float:
    """Relative distance of two sets of weights."""
    assert ours.keys() == theirs.keys()
    difference = torch.cat([(ours[name].cpu() - theirs[name].cpu()).flatten() for name in theirs])
    return float(difference.norm() / torch.cat([value.cpu().flatten() for value in theirs.values()]).norm())


class Pace(Callback):
    """Say where the run is, in a file, and take so long there that it can be met."""

    def __init__(self, folder: Path, seconds: float) -> None:
        self.place, self.seconds = folder / "place", seconds
        if "LOCAL_RANK" not in os.environ:  # of the process that has started the others
            (folder / "pid").write_text(str(os.getpid()))
        fsync = os.fsync

        def slow_fsync(handle: int) -> None:
            if stat.S_ISREG(os.fstat(handle).st_mode):  # a checkpoint's file is open and not yet in its place
                self.at("checkpoint")
                self.place.write_text("between")
            fsync(handle)

        os.fsync = slow_fsync

    def at(self, place: str) -> None:
        self.place.write_text(place)
        time.sleep(self.seconds)

    def on_before_zero_grad(self, *_: Any) -> None:
        self.at("step")

    def on_train_batch_end(self, *_: Any) -> None:
        self.place.write_text("between")

    def on_validation_batch_start(self, *_: Any) -> None:
        self.at("validation")


def run(
    folder: str,
    output: str,
    module: dict[str, Any],
    data: dict[str, Any],
    trainer: dict[str, Any],
    pace: float | None = None,
    every_n_steps: int | None = None,
    ckpt_path: str | None = None,
    pictures: bool = False,
) -> None:
    """Train with everything that a real run has, and leave ``student.pt``."""
    seed_everything(3, verbose=False)
    out = Path(output)
    plot = HeadTailPlot(str(out))
    callbacks: list[Callback] = [
        AdaptiveWeightMonitor(every_n_steps=2),
        plot,
        LastCheckpoint(out / "checkpoints", every_n_steps=every_n_steps),
    ]
    if pictures:
        callbacks += [HeadWeightMap(), DistributionPlot(), SampledAnswers(2), StudentExport()]
    if pace is not None:
        callbacks.insert(0, Pace(out, pace))
    settings = {
        **QUIET, "enable_checkpointing": True, "log_every_n_steps": 1, "callbacks": callbacks, "default_root_dir": out,
        "logger": TensorBoardLogger(out, name="logs", version=""),
    }  # fmt: skip
    trainer_ = Trainer(**{**settings, **trainer})
    module_ = module_of(Path(folder), **module)
    trainer_.fit(module_, data_of(Path(folder), **data), ckpt_path=ckpt_path)
    weights = whole_state(trainer_)
    if trainer_.is_global_zero:
        torch.save(weights, out / "student.pt")
        (out / "head_tail_error.json").write_text(json.dumps(plot.history))


def start(settings: dict[str, Any], errors: Path) -> ForkServerProcess:
    """:func:`run` in a process of its own, which says on ``errors`` what the command would say."""
    process = forkserver().Process(target=_run_as_command, args=(settings, errors))
    process.start()
    return process


def _run_as_command(settings: dict[str, Any], errors: Path) -> None:
    os.dup2(os.open(errors, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), sys.stderr.fileno())
    run_command(lambda: run(**settings))


def forkserver() -> Any:
    """Processes forked from one that has done the imports, and nothing else, once."""
    context = torch.multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__])
    return context


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def launch(work: Callable[..., None], *arguments: Any, ranks: int = 2, timeout: float = 150) -> None:
    """Run ``work(rank, *arguments)`` in processes of their own, in which a Trainer finds itself one of several."""
    forkserver()
    context = torch.multiprocessing.start_processes(
        _rank, (ranks, free_port(), work, arguments), nprocs=ranks, join=False, start_method="forkserver"
    )
    deadline = time.monotonic() + timeout
    try:
        while not context.join(timeout=max(0.1, deadline - time.monotonic())):
            if time.monotonic() >= deadline:
                raise TimeoutError(f"{work.__name__} has not ended within {timeout} seconds")
    finally:
        for process in context.processes:
            process.kill()


def _rank(rank: int, ranks: int, port: int, work: Callable[..., None], arguments: tuple[Any, ...]) -> None:
    os.environ.update(
        RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(ranks), LOCAL_WORLD_SIZE=str(ranks), GROUP_RANK="0",
        MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), TORCHELASTIC_RUN_ID="test",
    )  # fmt: skip
    work(rank, *arguments)


if __name__ == "__main__":
    run_command(lambda: run(**json.loads(Path(sys.argv[1]).read_text())))
