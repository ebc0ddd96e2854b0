"""A cache written by two processes and read by one, and the reverse; a teacher that is sharded over the writers."""

import json
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Trainer
from transformers import AutoTokenizer

from akl_lightning.criterion import DistillationCriterion
from akl_lightning.data.module import InstructionDataModule
from akl_lightning.data.sources import JsonLines
from akl_lightning.module import DistillationModule
from akl_lightning.teachers.cache.reader import CachedTeacher
from akl_lightning.teachers.cache.writer import CacheWriter, write_cache
from tests.conftest import PAIRS, QUIET, gpt2
from tests.distributed.training import launch


@pytest.fixture
def folder(tmp_path: Path, tokenizer: Any, corpus: str) -> Path:
    gpt2(24).save_pretrained(tmp_path / "teacher")
    tokenizer.save_pretrained(tmp_path / "teacher")
    return tmp_path


def data(folder: Path) -> InstructionDataModule:
    tokenizer = AutoTokenizer.from_pretrained(folder / "teacher")
    sizes = {"batch_size": 3, "max_length": 40, "validation_size": 4, "test_size": 5}
    return InstructionDataModule(tokenizer, JsonLines(str(folder / "pairs.jsonl")), **sizes)


def write(folder: Path, name: str, ranks: int, top_k: int | None = None, **settings: Any) -> None:
    writer = CacheWriter(str(folder / "teacher"), str(folder / name), shard_tokens=60, top_k=top_k)
    write_cache(writer, data(folder), trainer(ranks, **settings))
    if settings:
        parameters = list(writer.teacher.model.parameters())
        assert all(parameter.to_local().numel() < parameter.numel() for parameter in parameters)


def trainer(ranks: int, **settings: Any) -> Trainer:
    return Trainer(**{**QUIET, "devices": ranks, "strategy": "ddp" if ranks > 1 else "auto", **settings})


def train(folder: Path, name: str, ranks: int) -> None:
    """Steps of six samples, however many ranks share them."""
    torch.manual_seed(1)
    module = DistillationModule(gpt2(16), f"cache:{folder / name}", optimizer=lambda p: torch.optim.SGD(p, 0.1))
    fit = trainer(ranks, max_epochs=1, accumulate_grad_batches=2 // ranks)
    fit.fit(module, data(folder))
    if fit.is_global_zero:
        weights = torch.cat([parameter.detach().flatten() for parameter in module.student.parameters()])
        torch.save(weights, folder / f"{name}-{ranks}.pt")


def of_rank(rank: int, function: Any, *arguments: Any) -> None:
    function(*arguments)


def on_two(function: Any, *arguments: Any) -> None:
    launch(of_rank, function, *arguments)


def manifest(folder: Path, name: str) -> dict[str, Any]:
    return json.loads((folder / name / "manifest.json").read_text())


def hidden(folder: Path, name: str) -> torch.Tensor:
    """All that is in the cache, in the order of the data."""
    teacher, data_ = CachedTeacher(folder / name), data(folder)
    data_.setup("fit")
    parts = []
    for split in data_.splits:
        for batch in data_.samples(split):
            positions, _ = DistillationCriterion().response_positions(batch["labels"])
            parts.append(teacher(batch, positions).hidden)
    return torch.cat(parts)


def test_two_write_and_one_reads_and_the_reverse(folder: Path) -> None:
    on_two(write, folder, "two", 2)
    write(folder, "one", 1)
    one, two = manifest(folder, "one"), manifest(folder, "two")
    assert two["complete"] and two["data"] == one["data"] and two["data"]["samples"] == len(PAIRS)
    assert sum(shard["samples"] for shard in two["shards"]) == len(PAIRS), "each rank wrote its share"
    assert len(two["shards"]) > 2
    assert torch.allclose(hidden(folder, "one"), hidden(folder, "two"), atol=0.02)

    on_two(train, folder, "one", 2)
    train(folder, "one", 1)
    train(folder, "two", 1)
    by_two, by_one, of_two = (torch.load(folder / f"{name}.pt") for name in ("one-2", "one-1", "two-1"))
    assert (by_two - by_one).norm() <= 1e-5 * by_one.norm()
    assert (of_two - by_one).norm() <= 1e-3 * by_one.norm()


class Stops(CacheWriter):
    """Does not come to the end."""

    def on_predict_end(self) -> None:
        self._flush()


def begin(folder: Path, name: str) -> None:
    writer = Stops(str(folder / "teacher"), str(folder / name), shard_tokens=10)
    write_cache(writer, data(folder), trainer(2, limit_predict_batches=2))


def test_another_number_of_devices_goes_on(folder: Path) -> None:
    on_two(begin, folder, "cache")
    assert not manifest(folder, "cache")["complete"]
    there = {file.name: file.stat().st_mtime_ns for file in (folder / "cache").glob("shard-*")}
    assert len(there) >= 4
    write(folder, "cache", 1)
    after = manifest(folder, "cache")
    assert after["data"]["samples"] == sum(shard["samples"] for shard in after["shards"]) == len(PAIRS)
    assert there.items() <= {file.name: file.stat().st_mtime_ns for file in (folder / "cache").glob("*")}.items()
    on_two(write, folder, "cache", 2)  # nothing is left to do, on any number of devices
    assert manifest(folder, "cache") == after


def test_a_sharded_teacher(folder: Path) -> None:
    write(folder, "one", 1)
    on_two(partial(write, strategy="fsdp2"), folder, "sharded", 2)
    on_two(partial(write, strategy="fsdp2", top_k=4), folder, "sharded, top 4", 2)
    assert manifest(folder, "sharded, top 4")["complete"]
    assert manifest(folder, "sharded")["teacher"] == manifest(folder, "one")["teacher"]
    assert manifest(folder, "sharded")["data"] == manifest(folder, "one")["data"]
    assert manifest(folder, "sharded")["head"] == manifest(folder, "one")["head"]
    assert torch.allclose(hidden(folder, "one"), hidden(folder, "sharded"), atol=0.02)
