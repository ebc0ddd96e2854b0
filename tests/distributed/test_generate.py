"""Answers do not depend on how many processes write them, nor on whether the model is sharded."""

from pathlib import Path

import pytest
import torch
from lightning.pytorch import Trainer
from transformers import PreTrainedTokenizerFast

from akl_lightning.evaluation.answers import read_answers
from akl_lightning.evaluation.decoding import Decoding
from akl_lightning.evaluation.generate import AnswerWriter
from tests.conftest import QUIET, answered_in_test
from tests.distributed.training import data_of, launch, module_of, prepare

DECODING = Decoding(max_new_tokens=6, seeds=(10, 20))


def write(folder: Path, name: str, batch_size: int, **trainer: object) -> None:
    torch.manual_seed(0)
    data = data_of(folder, batch_size=batch_size)
    figures, answers = answered_in_test(module_of(folder), data, folder / f"{name}, test.jsonl", DECODING, **trainer)
    assert len(answers) == 5, "on every rank"
    torch.save(figures, folder / f"{name}.pt")
    data.predict_split = "train"
    writer = AnswerWriter(str(folder / "teacher"), folder / f"{name}, train.jsonl", DECODING)
    Trainer(**QUIET, **trainer).predict(writer, data, return_predictions=False)


def on_two(rank: int, folder: Path, strategy: str) -> None:
    write(folder, strategy, 3, strategy=strategy, devices=2)


@pytest.mark.parametrize("strategy", ["ddp", "fsdp2"])
def test_two_processes_answer_as_one(tmp_path: Path, tokenizer: PreTrainedTokenizerFast, strategy: str) -> None:
    prepare(tmp_path, tokenizer)
    write(tmp_path, "one", 8)
    launch(on_two, tmp_path, strategy)
    for split, count in (("test", 10), ("train", 50)):
        ours, theirs = (read_answers(tmp_path / f"{name}, {split}.jsonl") for name in (strategy, "one"))
        assert ours == theirs and len(ours) == count
    assert torch.load(tmp_path / f"{strategy}.pt") == pytest.approx(torch.load(tmp_path / "one.pt"), rel=1e-5, abs=1e-6)
    assert not list(tmp_path.glob("*.part*"))
