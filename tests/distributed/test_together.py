"""Two ranks choose one folder, and a mistake that one of them alone meets ends both, said once."""

import errno
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from filelock import FileLock
from lightning.pytorch import Trainer
from transformers import PreTrainedTokenizerFast

from akl_lightning.errors import UsageError
from akl_lightning.evaluation import answers
from akl_lightning.evaluation.decoding import Decoding
from akl_lightning.evaluation.generate import AnswerWriter
from akl_lightning.teachers.cache import format as cache_folder
from akl_lightning.teachers.cache.writer import CacheWriter, write_cache
from common.runs import claim_run
from tests.conftest import QUIET
from tests.distributed.training import data_of, launch, prepare


def ends(work: Callable[[], object]) -> str:
    """How a rank's work ends."""
    try:
        work()
    except UsageError as error:
        return str(error)
    except SystemExit as end:
        return f"exit {end.code}"
    return "done"


def full_disk(*_: Any) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def refuse(path: Path, content: bytes) -> None:
    raise UsageError(f"cannot write {path} (No space left on device)")


def on_two(rank: int, folder: Path) -> None:
    run = claim_run(folder / "runs/one")
    del os.environ["AKL_RUN_FOLDER"]
    found = {"run": run.name}
    data = data_of(folder, batch_size=4)
    data.predict_split = "train"
    ranks = {**QUIET, "devices": 2, "strategy": "ddp"}

    def answer(name: str) -> None:
        model = AnswerWriter(str(folder / "teacher"), folder / name, Decoding(max_new_tokens=2))
        Trainer(**ranks).predict(model, data, return_predictions=False)

    def cache(name: str) -> None:
        model = CacheWriter(str(folder / "teacher"), str(folder / name), shard_tokens=20)
        write_cache(model, data_of(folder, batch_size=4), Trainer(**ranks))

    held = FileLock(folder / ".held.jsonl.lock")
    if rank == 0:  # as another run would
        held.acquire()
    found["answers, another run"] = ends(lambda: answer("held.jsonl"))
    found["answers, no folder"] = ends(lambda: answer("file/a.jsonl"))
    found["cache, no folder"] = ends(lambda: cache("file/cache"))
    sync, write = answers.os.fsync, cache_folder.write_file
    if rank == 0:  # which alone writes
        answers.os.fsync = full_disk
    found["answers, full disk"] = ends(lambda: answer("full.jsonl"))
    answers.os.fsync = sync
    if rank == 1:
        cache_folder.write_file = refuse
    found["cache, full disk"] = ends(lambda: cache("full"))
    cache_folder.write_file = write
    found["cache, again"] = ends(lambda: cache("full"))
    torch.distributed.barrier()
    (folder / f"{rank}.json").write_text(json.dumps(found))


@pytest.fixture
def folder(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> Path:
    prepare(tmp_path, tokenizer)
    (tmp_path / "file").write_text("no folder")
    (tmp_path / "runs/one").mkdir(parents=True)
    return tmp_path


def test_both_ranks_choose_one_folder_and_end_together(folder: Path) -> None:
    launch(on_two, folder)
    first, second = (json.loads((folder / f"{rank}.json").read_text()) for rank in (0, 1))
    assert first["run"] == second["run"] == "one-v1" and not (folder / "runs/one-v2").exists()
    assert "another run is writing answers to" in first["answers, another run"]
    assert "cannot write to" in first["answers, no folder"] and "cannot write to" in first["cache, no folder"]
    assert "No space left on device" in first["answers, full disk"] and "No space" in first["cache, full disk"]
    assert first["cache, again"] == second["cache, again"] == "done"
    assert {end for name, end in second.items() if name not in ("run", "cache, again")} == {"exit 0"}
