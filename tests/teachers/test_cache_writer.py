"""Writing a cache: killed, resumed, on a full disk, from the command line."""

import json
import shutil
import signal
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Trainer
from torch import nn

from akl_lightning.criterion import DistillationCriterion
from akl_lightning.data.module import InstructionDataModule
from akl_lightning.data.sources import JsonLines
from akl_lightning.errors import UsageError
from akl_lightning.teachers.cache.format import open_shard
from akl_lightning.teachers.cache.reader import CachedTeacher
from akl_lightning.teachers.cache.writer import CacheWriter, write_cache
from tests.commands.start import python, warm
from tests.conftest import QUIET, gpt2, write

SIZES = {"max_length": 40, "batch_size": 4, "validation_size": 4, "test_size": 4}


@pytest.fixture
def folder(tmp_path: Path, tokenizer: Any, corpus: str) -> Path:
    """A teacher beside the corpus."""
    gpt2(24).save_pretrained(tmp_path / "teacher")
    tokenizer.save_pretrained(tmp_path / "teacher")
    return tmp_path


def akl(folder: Path, *arguments: str, command: Sequence[str] = ()) -> subprocess.CompletedProcess[str]:
    command = command or [str(warm() / "akl")]
    data = ["--data.tokenizer=teacher", "--data.source=JsonLines", "--data.source.path=pairs.jsonl"]
    data += [f"--data.{name}={value}" for name, value in SIZES.items()]
    return subprocess.run([*command, *arguments, *data], cwd=folder, capture_output=True, text=True, timeout=200)


def manifest(cache: Path) -> dict[str, Any]:
    return json.loads((cache / "manifest.json").read_text())


def test_the_command_writes_a_cache_and_training_takes_it_by_config_alone(folder: Path) -> None:
    result = akl(folder, "cache", "--model.teacher=teacher", "--model.path=cache")
    assert result.returncode == 0, result.stderr[-2000:]
    assert "36 samples with 447 response tokens to write, 0 samples are there" in result.stderr
    assert "0.01 MB at 26 bytes a token, and 0.03 MB for the output layer" in result.stderr
    assert "447/447" in result.stderr and "token/s" in result.stderr  # the bar
    assert "447 tokens written in" in result.stderr
    assert not (folder / "lightning_logs").exists()
    (folder / "teacher/model.safetensors").unlink()
    shutil.copytree(folder / "teacher", folder / "student")
    gpt2(16).save_pretrained(folder / "student")
    quiet = [f"--trainer.{name}=false" for name in ("logger", "enable_checkpointing", "enable_progress_bar")]
    fit = ["fit", "--model.student=student", "--model.teacher=cache:cache", "--trainer.max_epochs=1"]
    result = akl(folder, *fit, *quiet)
    assert result.returncode == 0, result.stderr[-2000:]
    assert "`Trainer.fit` stopped: `max_epochs=1` reached" in result.stderr
    for file in (folder / "cache").glob("shard-*"):
        file.write_bytes(file.read_bytes()[:-9])
    result = akl(folder, *fit, *quiet)
    assert result.returncode == 2
    (error,) = [line for line in result.stderr.splitlines() if line.startswith("error:")]
    assert "bytes instead of" in error and "Traceback" not in result.stderr


# --------------------------------------------------------------------------------------------------------------------
# Killed and resumed


SLOW = """
import sys, time
from lightning.pytorch import Trainer
from akl_lightning.data.module import InstructionDataModule
from akl_lightning.data.sources import JsonLines
from akl_lightning.teachers.cache.writer import CacheWriter, write_cache

writer = CacheWriter("teacher", "cache", shard_tokens=40)
writer.teacher.read().model.transformer.register_forward_hook(lambda *_: time.sleep(0.5))
data = InstructionDataModule("teacher", JsonLines("pairs.jsonl"), **{sizes})
write_cache(writer, data, Trainer(accelerator="cpu", logger=False))
"""


def killed(folder: Path) -> None:
    """Start a slow writer and kill it when it has some shards."""
    (folder / "slow.py").write_text(SLOW.replace("{sizes}", repr(SIZES)))
    process = subprocess.Popen([python(), "slow.py"], cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
    try:
        deadline = time.monotonic() + 120
        while len(list((folder / "cache").glob("shard-*"))) < 3 and time.monotonic() < deadline:
            assert process.poll() is None
            time.sleep(0.05)
        process.send_signal(signal.SIGKILL)
        process.communicate(timeout=30)  # until all that has its output is gone
    finally:
        process.kill()
        process.wait()


class Counted(CacheWriter):
    """Notes how many samples the teacher is asked for."""

    def setup(self, stage: str) -> None:
        super().setup(stage)
        self.asked = 0

        def count(model: nn.Module, args: Any, kwargs: Any) -> None:
            self.asked += len(kwargs["input_ids"])

        self.teacher.model.model.transformer.register_forward_pre_hook(count, with_kwargs=True)


def test_a_killed_run_goes_on_behind_its_complete_shards(folder: Path, data: InstructionDataModule) -> None:
    killed(folder)
    cache = folder / "cache"
    with pytest.raises(UsageError, match="is unfinished: run the same akl cache again, it goes on where it stopped"):
        CachedTeacher(cache)
    there = {file: file.stat().st_mtime_ns for file in cache.glob("shard-*")}
    # What a kill in the middle of a shard leaves, and a shard that was damaged since.
    (cache / ".shard-1234.safetensors.x1y2").write_bytes(b"half")
    broken = sorted(there)[0]
    broken.write_bytes(broken.read_bytes()[:-1])
    del there[broken]

    writer = Counted(str(folder / "teacher"), str(cache), shard_tokens=40)
    write_cache(writer, data, Trainer(**QUIET))
    assert {file: file.stat().st_mtime_ns for file in there} == there, "complete shards are left alone"
    assert not (cache / ".shard-1234.safetensors.x1y2").exists()
    shards = {cache / entry["file"]: entry for entry in manifest(cache)["shards"]}
    assert shards.keys() == set(cache.glob("shard-*"))
    assert 0 < writer.asked == 36 - sum(shards[file]["samples"] for file in there) < 36
    assert manifest(cache)["data"]["samples"] == 36 and manifest(cache)["data"]["tokens"] == 447

    whole = CachedTeacher(write(str(folder / "teacher"), folder / "whole", data).removeprefix("cache:"))
    assert whole.manifest["data"] == manifest(cache)["data"]
    ours = CachedTeacher(cache)
    for batch in data.samples("train", 8):
        positions, _ = DistillationCriterion().response_positions(batch["labels"])
        assert torch.allclose(ours(batch, positions).hidden, whole(batch, positions).hidden, atol=0.02)


def test_more_data_are_added_to_a_finished_cache(folder: Path, tokenizer: Any, data: InstructionDataModule) -> None:
    cache, lines = folder / "cache", (folder / "pairs.jsonl").read_text().splitlines(keepends=True)
    (folder / "some.jsonl").write_text("".join(lines[:20]))
    some = InstructionDataModule(tokenizer, JsonLines(str(folder / "some.jsonl")), **SIZES)
    write(str(folder / "teacher"), cache, some)
    assert manifest(cache)["data"]["samples"] == 20
    writer = Counted(str(folder / "teacher"), str(cache))
    write_cache(writer, data, Trainer(**QUIET))
    assert writer.asked == 16
    assert manifest(cache)["data"]["samples"] == 36
    writer = Counted(str(folder / "teacher"), str(cache))
    write_cache(writer, data, Trainer(**QUIET))
    assert writer.asked == 0


# --------------------------------------------------------------------------------------------------------------------
# What cannot be done


def test_a_full_disk_ends_with_one_sentence(folder: Path) -> None:
    # The manifest fits, the output layer (28,800 bytes) or a shard (54,534 bytes) does not.
    limited = "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (16_000, 16_000)); "
    limited += "from akl_lightning.cli import main; main()"
    for number, settings in enumerate(([], ["--model.top_k=20"])):
        cache = ["cache", "--model.teacher=teacher", f"--model.path=cache{number}", *settings]
        result = akl(folder, *cache, command=[python(), "-c", limited])
        assert result.returncode == 2, result.stderr[-2000:]
        (error,) = [line for line in result.stderr.splitlines() if line.startswith("error:")]
        assert "cannot write" in error and "File too large" in error and "run the same command again" in error
        assert "Traceback" not in result.stderr
        assert {file.name for file in (folder / f"cache{number}").iterdir()} == {".lock", "manifest.json"}
        assert not manifest(folder / f"cache{number}")["complete"]
    result = akl(folder, *cache)
    assert result.returncode == 0, result.stderr[-2000:]
    CachedTeacher(folder / "cache1")


def test_what_does_not_fit_the_disk_is_not_begun(
    folder: Path, data: InstructionDataModule, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10**6, 10**6 - 1000, 1000))
    with pytest.raises(UsageError, match=r"0\.01 MB do not fit on the disk of .*cache, 0\.00 MB are free: make room"):
        write(gpt2(24), folder / "cache", data)


def test_folders_that_are_not_touched(folder: Path, data: InstructionDataModule) -> None:
    with pytest.raises(UsageError, match="is not empty and no teacher's cache: give another path"):
        write(gpt2(24), folder / "teacher", data)
    write(str(folder / "teacher"), folder / "cache", data)
    with pytest.raises(UsageError, match=r"has another codec \(int8 there, int4 here\): give another path"):
        write(str(folder / "teacher"), folder / "cache", data, codec="int4")
    with pytest.raises(UsageError, match=r"has another codec \(int8 there, None here\) and top_k \(None there, 8 here"):
        write(str(folder / "teacher"), folder / "cache", data, top_k=8)
    assert CachedTeacher(folder / "cache").manifest["complete"]


def test_two_runs_do_not_write_to_one_folder(folder: Path, data: InstructionDataModule) -> None:
    class Second(CacheWriter):
        def on_predict_end(self) -> None:
            with pytest.raises(UsageError, match=r"another run is writing to .*cache: wait for it"):
                write(str(folder / "teacher"), folder / "cache", data)
            super().on_predict_end()

    write_cache(Second(str(folder / "teacher"), str(folder / "cache")), data, Trainer(**QUIET))


def test_a_teacher_that_gives_nan(folder: Path, data: InstructionDataModule) -> None:
    teacher = gpt2(24)
    teacher.transformer.h[0].ln_1.weight.data.fill_(torch.nan)
    for settings in ({}, {"top_k": 4}):
        with pytest.raises(UsageError, match="gives NaN or infinite values: load it in another precision"):
            write(teacher, folder / f"cache{len(settings)}", data, **settings)


def test_bad_settings(folder: Path, data: InstructionDataModule) -> None:
    with pytest.raises(UsageError, match="unknown codec 'int3'"):
        CacheWriter(gpt2(24), "cache", codec="int3")
    with pytest.raises(UsageError, match="top_k must be 1 or more, got 0"):
        CacheWriter(gpt2(24), "cache", top_k=0)
    with pytest.raises(UsageError, match=r"max_length = 40 is beyond the 32 positions of the teacher"):
        write(gpt2(24, positions=32), folder / "cache", data)
    with pytest.raises(UsageError, match="run it with write_cache"):
        Trainer(**QUIET).predict(CacheWriter(gpt2(24), str(folder / "cache")), data)


def test_a_teacher_in_another_precision(folder: Path, data: InstructionDataModule) -> None:
    hidden = []
    for precision in ("float32", "bfloat16"):
        writer = CacheWriter(str(folder / "teacher"), str(folder / precision), "bfloat16", teacher_precision=precision)
        write_cache(writer, data, Trainer(**QUIET))
        assert next(iter(writer.teacher.model.parameters())).dtype == getattr(torch, precision)
        (shard,) = (folder / precision).glob("shard-*")
        hidden.append(open_shard(shard)["values"].float())
    assert 0 < (hidden[0] - hidden[1]).norm() < 0.02 * hidden[0].norm()
