"""Small things that tests share: a corpus, a tokenizer, models that train in a second."""

import json
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

# Whatever a test does, it must not reach for the hub; its library reads this when it is imported.
os.environ["HF_HUB_OFFLINE"] = "1"
# Nor leave anything in the user's cache.
CACHE = tempfile.TemporaryDirectory(prefix="akl-tests-")
os.environ["HF_DATASETS_CACHE"] = CACHE.name
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# Models this small are faster on one core, and threads that wait for each other are slow on a busy machine.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
import torch
from lightning.pytorch import Trainer
from tokenizers import ByteLevelBPETokenizer
from torch import Tensor, nn
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

from akl_lightning.data.module import InstructionDataModule
from akl_lightning.data.sources import JsonLines
from akl_lightning.evaluation.answers import Record
from akl_lightning.evaluation.decoding import Decoding
from akl_lightning.evaluation.generate import AnswerEvaluation
from akl_lightning.module import DistillationModule
from akl_lightning.teachers.cache.writer import CacheWriter, write_cache

TESTS = Path(__file__).parent
PAIRS = [
    {"instruction": f"Say {word}", "input": "", "output": f"{word} and {word} again" + " yes" * (index % 7)}
    for index, word in enumerate(
        ["one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve"] * 3
    )
]
PAIRS = [{**pair, "instruction": f"{pair['instruction']} {index}"} for index, pair in enumerate(PAIRS)]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """What takes long comes first, so that the workers of pytest-xdist end together.

    By files, each of which one worker has: what a file's tests share is made once. The package's examples come last.
    """
    slow = {item.path for item in items if item.get_closest_marker("slow")}
    folders = {"end_to_end": 1, "distributed": 2, "recipes": 3, "evaluation": 4}

    def place(path: Path) -> int:
        if path in slow:
            return 0
        return folders.get(path.parent.name, 5) if path.is_relative_to(TESTS) else 6

    items.sort(key=lambda item: place(item.path))


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def environment() -> Iterator[None]:
    """As it was before the test: Lightning leaves ranks, ports and seeds there."""
    with mock.patch.dict(os.environ):
        yield


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerFast:
    bpe = ByteLevelBPETokenizer()
    bpe.train_from_iterator([json.dumps(pair) for pair in PAIRS], 300, special_tokens=["<|endoftext|>"])
    special = dict.fromkeys(("bos_token", "eos_token", "pad_token"), "<|endoftext|>")
    return PreTrainedTokenizerFast(tokenizer_object=bpe._tokenizer, **special)


@pytest.fixture
def tokenizer_folder(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> str:
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    return str(tmp_path / "tokenizer")


@pytest.fixture
def corpus(tmp_path: Path) -> str:
    path = tmp_path / "pairs.jsonl"
    path.write_text("".join(json.dumps(pair) + "\n" for pair in PAIRS))
    return str(path)


def gpt2(width: int = 16, vocab_size: int = 300, positions: int = 64, layers: int = 1) -> GPT2LMHeadModel:
    return GPT2LMHeadModel(
        GPT2Config(
            vocab_size=vocab_size, n_positions=positions, n_embd=width, n_layer=layers, n_head=2, bos_token_id=0,
            eos_token_id=0, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0,
        )
    )  # fmt: skip


class Bigram(nn.Module):
    """No transformers model: logits of the next token from the last one."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(300, 300)

    def forward(self, batch: dict[str, Tensor]) -> Tensor:
        return self.table(batch["input_ids"])


QUIET = {
    "accelerator": "cpu",
    "logger": False,
    "enable_checkpointing": False,
    "enable_progress_bar": False,
    "enable_model_summary": False,
}
"""Trainer settings of a test that looks at parameters and metrics only."""


def write(teacher: nn.Module, path: Path, data: object, **settings: object) -> str:
    """Cache a teacher; what DistillationModule takes in its place."""
    return f"cache:{write_cache(CacheWriter(teacher, str(path), **settings), data, Trainer(**QUIET))}"


def answered_in_test(
    module: DistillationModule, data: InstructionDataModule, path: Path, decoding: Decoding, **trainer: Any
) -> tuple[dict[str, float], list[list[Record]]]:
    """What a test logs that lets the student answer, and the answers."""
    evaluation = AnswerEvaluation(path, decoding)
    (figures,) = Trainer(**QUIET, **trainer, callbacks=[evaluation]).test(module, data, verbose=False)
    return dict(figures), evaluation.answers


@pytest.fixture
def data(tokenizer: PreTrainedTokenizerFast, corpus: str) -> InstructionDataModule:
    return InstructionDataModule(
        tokenizer, JsonLines(corpus), batch_size=4, max_length=40, validation_size=4, test_size=4
    )
