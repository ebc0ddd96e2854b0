"""Killed wherever it may be, a run goes on and ends as if nothing had been: processes, signals and files are real."""

import json
import os
import random
import shutil
import signal
import time
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from transformers import PreTrainedTokenizerFast

from akl_lightning.callbacks import LastCheckpoint
from akl_lightning.checkpoint_io import newest_checkpoint
from akl_lightning.errors import UsageError
from tests.distributed import training
from tests.distributed.training import prepare

# Several validations within an epoch of 13 micro-batches, optimizer steps over two of them, checkpoints after three
# steps, and dropout: whatever a resume may get wrong shows.
SETTINGS: dict[str, Any] = {
    "module": {"lr_scheduler": "cosine", "warmup_steps": 3},
    "data": {"batch_size": 2, "num_workers": 0},
    "trainer": {"max_epochs": 3, "accumulate_grad_batches": 2, "gradient_clip_val": 0.5, "val_check_interval": 5},
    "every_n_steps": 3,
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, tokenizer: PreTrainedTokenizerFast) -> Path:
    folder = tmp_path_factory.mktemp("resume")
    prepare(folder, tokenizer)
    path = folder / "student/config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "resid_pdrop": 0.1, "embd_pdrop": 0.1}))
    return folder


def start(folder: Path, output: Path, **changed: Any) -> ForkServerProcess:
    output.mkdir(exist_ok=True)
    (output / "place").unlink(missing_ok=True)
    settings = {"folder": str(folder), "output": str(output), **SETTINGS, **changed}
    return training.start(settings, output / "errors")


def finish(process: ForkServerProcess, output: Path, timeout: float = 120) -> str:
    process.join(timeout)
    ended = process.exitcode is not None
    process.kill()
    assert ended, f"it has not ended within {timeout} seconds"
    return (output / "errors").read_text()


def place(output: Path) -> str:
    path = output / "place"
    return path.read_text() if path.exists() else ""


def scalars(output: Path) -> dict[tuple[str, int], float]:
    """All that was logged; what was logged again counts once, and has to be the same."""
    events = EventAccumulator(str(output / "logs"), size_guidance={"scalars": 0}, purge_orphaned_data=False).Reload()
    found: dict[tuple[str, int], float] = {}
    for tag in events.Tags()["scalars"]:
        for event in events.Scalars(tag):
            assert found.setdefault((tag, event.step), event.value) == event.value, (tag, event.step)
    return found


def same(output: Path, undisturbed: Path) -> None:
    mine, theirs = (torch.load(path / "student.pt") for path in (output, undisturbed))
    assert mine.keys() == theirs.keys()
    assert all(torch.equal(mine[name], theirs[name]) for name in theirs)
    assert scalars(output) == scalars(undisturbed)
    assert (output / "head_tail_error.json").read_text() == (undisturbed / "head_tail_error.json").read_text()


class KeepsAll(LastCheckpoint):
    """Keeps every file that a run writes, and what was logged before it."""

    def _write(self, trainer: Trainer, pl_module: LightningModule) -> None:
        super()._write(trainer, pl_module)
        folder = self.path.parent.parent / "kept" / str(len(list(self.path.parent.parent.glob("kept/*"))))
        folder.mkdir(parents=True)
        shutil.copy(self.path, folder / "last.ckpt")
        shutil.copytree(self.path.parent.parent / "logs", folder / "logs")


@pytest.mark.parametrize(
    "changed",
    [
        {},
        {"trainer": {"max_epochs": 2}, "every_n_steps": 1, "data": {"batch_size": 4}},
        {"trainer": {"max_epochs": 2, "limit_val_batches": 0}, "data": {"batch_size": 4}},
        {"trainer": {"max_epochs": 3, "check_val_every_n_epoch": 2}, "data": {"batch_size": 8, "num_workers": 1}},
        {
            "module": {"max_new_tokens": 4},
            "trainer": {"max_epochs": 2, "val_check_interval": 2},
            "data": {"batch_size": 8},
            "every_n_steps": 1,
            "pictures": True,
        },
        {"trainer": {"max_steps": 9, "val_check_interval": 3, "check_val_every_n_epoch": None}, "every_n_steps": 3},
    ],
    ids=["validation within steps", "every step", "no validation", "workers", "pictures", "steps"],
)
def test_checkpoints_of_a_run_go_on_to_the_same_end(
    folder: Path, tmp_path: Path, changed: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = {"folder": str(folder), **SETTINGS, **changed}
    with monkeypatch.context() as patch:
        patch.setattr(training, "LastCheckpoint", KeepsAll)
        training.run(**settings, output=str(tmp_path / "whole"))
    kept = sorted((tmp_path / "whole/kept").iterdir(), key=lambda path: int(path.name))
    assert len(kept) >= 3
    for start in {kept[0], kept[len(kept) // 2], kept[-2]}:
        output = tmp_path / f"from {start.name}"
        shutil.copytree(start / "logs", output / "logs")  # what a process that is killed now would leave
        training.run(**settings, output=str(output), ckpt_path=str(start / "last.ckpt"))
        same(output, tmp_path / "whole")


@pytest.fixture(scope="module")
def undisturbed(folder: Path) -> Path:
    output = folder / "undisturbed"
    process = start(folder, output)
    errors = finish(process, output)
    assert process.exitcode == 0, errors
    return output


def last(output: Path) -> str | None:
    try:
        return str(newest_checkpoint(output, [output / "checkpoints"]))
    except UsageError:
        return None


def wait_until(output: Path, where: str, process: ForkServerProcess) -> None:
    deadline = time.monotonic() + 120
    while place(output) != where:
        assert process.is_alive() and time.monotonic() < deadline, f"never came to {where}: {finish(process, output)}"
        time.sleep(0.002)


ASKED = {"asked": signal.SIGTERM, "interrupted": signal.SIGINT}


def test_killed_in_a_validation_asked_to_end_killed_in_an_open_checkpoint_and_in_a_step(
    folder: Path, undisturbed: Path, tmp_path: Path
) -> None:
    waiting = ["validation", "asked", "checkpoint", "interrupted", "step"]
    for _ in range(15):  # a busy machine may let the moment pass
        if not waiting:
            break
        where = waiting[0]
        process = start(folder, tmp_path, pace=0.1, ckpt_path=last(tmp_path))
        wait_until(tmp_path, "step" if where in ASKED else where, process)
        if where in ASKED:
            assert process.pid is not None
            os.kill(process.pid, ASKED[where])
            errors = finish(process, tmp_path)
            assert process.exitcode == 128 + ASKED[where], errors
            assert "stopped as asked after optimizer step" in errors and "Traceback" not in errors
        else:
            process.kill()
            finish(process, tmp_path)
            if place(tmp_path) != where:
                continue
            if where == "checkpoint":
                assert list((tmp_path / "checkpoints").glob(".last.ckpt.*")), "no file was open"
        del waiting[0]
    assert not waiting
    process = start(folder, tmp_path, ckpt_path=last(tmp_path))
    errors = finish(process, tmp_path)
    assert process.exitcode == 0, errors
    same(tmp_path, undisturbed)


def test_a_second_ctrl_c_ends_at_once(folder: Path, tmp_path: Path) -> None:
    process = start(folder, tmp_path, pace=20.0)
    wait_until(tmp_path, "validation", process)  # the sanity check's, in which the Trainer's own way holds
    assert process.pid is not None
    os.kill(process.pid, signal.SIGINT)
    errors = finish(process, tmp_path, timeout=15)
    assert process.exitcode == 130 and "Traceback" not in errors
    process = start(folder, tmp_path, pace=20.0, trainer={"max_epochs": 1, "num_sanity_val_steps": 0})
    wait_until(tmp_path, "step", process)
    os.kill(process.pid or 0, signal.SIGINT)
    deadline = time.monotonic() + 15
    while "Ctrl-C again ends at once" not in (tmp_path / "errors").read_text() and time.monotonic() < deadline:
        time.sleep(0.05)
    assert process.is_alive()
    os.kill(process.pid or 0, signal.SIGINT)
    errors = finish(process, tmp_path, timeout=15)
    assert process.exitcode == 130 and "Traceback" not in errors, errors
    assert not (tmp_path / "checkpoints/last.ckpt").exists()


@pytest.mark.slow
def test_killed_ten_times_at_random(folder: Path, undisturbed: Path, tmp_path: Path) -> None:
    seed = int(os.environ.get("AKL_TEST_SEED") or random.SystemRandom().randrange(10**6))
    print(f"seed {seed}: repeat with AKL_TEST_SEED={seed}")
    draw = random.Random(seed)
    kills, runs, places = 0, 0, []
    while kills < 10 or runs == 0:
        output = tmp_path / f"run {runs}"
        process = start(folder, output, pace=0.02, ckpt_path=last(output))
        while process.is_alive() and not place(output):
            time.sleep(0.005)
        time.sleep(draw.uniform(0, 1.2) if kills < 10 else 0)
        if kills < 10 and process.is_alive():
            process.kill()
            finish(process, output)
            kills += 1
            places.append(place(output))
            continue
        errors = finish(process, output)
        assert process.exitcode == 0, errors
        same(output, undisturbed)
        runs += 1
    print(f"killed in {places}, {runs} runs completed")
