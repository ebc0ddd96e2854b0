"""Conversations through teacher, student and export: answers end where turns do, and not at the end of text."""

import json
import random
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Trainer
from lightning.pytorch.loggers import CSVLogger
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from akl_lightning.callbacks import SampledAnswers, StudentExport
from akl_lightning.criterion import DistillationCriterion
from akl_lightning.data.module import InstructionDataModule
from akl_lightning.data.sources import JsonLines
from akl_lightning.evaluation.answers import read_answers
from akl_lightning.evaluation.decoding import Decoding
from akl_lightning.evaluation.generate import AnswerEvaluation
from akl_lightning.module import DistillationModule
from tests.conftest import QUIET

CALLS = [f"word{number}" for number in range(8)]
REPLIES = {word: " ".join([word, "it", "is"][: 1 + number % 3]) for number, word in enumerate(CALLS)}
"""What is answered to a word, in one to three words."""

CONFIG = {"model_type": "llama", "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
          "num_attention_heads": 2, "max_position_embeddings": 64, "bos_token_id": 0, "eos_token_id": 0}  # fmt: skip


@pytest.fixture(scope="module")
def chat_tokenizer() -> PreTrainedTokenizerFast:
    """A base model's, with ChatML's marks and an end of text that the template never writes."""
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    words = [*special, *CALLS, "it", "is", "user", "assistant", "unknown"]
    model = Tokenizer(WordLevel({word: number for number, word in enumerate(words)}, "unknown"))
    model.pre_tokenizer = Whitespace()
    model.add_special_tokens(special)
    ends = dict.fromkeys(("bos_token", "eos_token", "pad_token"), "<|endoftext|>")
    return PreTrainedTokenizerFast(tokenizer_object=model, additional_special_tokens=special[1:], **ends)


@pytest.fixture(scope="module")
def chats(tmp_path_factory: pytest.TempPathFactory) -> str:
    path, draw = tmp_path_factory.mktemp("chats") / "chats.jsonl", random.Random(0)
    with path.open("w") as file:
        for words in draw.sample([*product(CALLS, repeat=2)], 60):
            messages = []
            for word in words:
                messages += [{"role": "user", "content": word}, {"role": "assistant", "content": REPLIES[word]}]
            file.write(json.dumps({"messages": messages}) + "\n")
    return str(path)


def test_a_student_ends_its_answers_where_its_teacher_does(
    chat_tokenizer: PreTrainedTokenizerFast, chats: str, tmp_path: Path
) -> None:
    data = InstructionDataModule(
        chat_tokenizer, JsonLines(chats), template="chatml", batch_size=8, max_length=48, validation_size=6, test_size=6
    )
    end, size = chat_tokenizer.convert_tokens_to_ids("<|im_end|>"), len(chat_tokenizer)
    config = CONFIG | {"vocab_size": size}
    fast: dict[str, Any] = {
        "optimizer": partial(torch.optim.AdamW, lr=1e-2),
        "max_new_tokens": 10,
        "lr_scheduler": "cosine",
    }
    taught = DistillationModule(config, criterion=DistillationCriterion(alpha=0), **fast)
    Trainer(**QUIET, max_epochs=30, limit_val_batches=0, gradient_clip_val=1.0).fit(taught, data)
    teacher = taught.student.model

    student = DistillationModule(config, teacher, DistillationCriterion(alpha=0.5), **fast)
    export = StudentExport(str(tmp_path / "student"))
    evaluation = AnswerEvaluation(tmp_path / "answers.jsonl", Decoding(10))
    settings = {**QUIET, "logger": CSVLogger(tmp_path, "logs", "")}
    callbacks = [export, evaluation, SampledAnswers(3)]
    trainer = Trainer(**settings, max_epochs=30, gradient_clip_val=1.0, callbacks=callbacks)
    trainer.fit(student, data)
    assert {"val/turn_1/head_error", "val/turn_2/tail_error"} <= trainer.callback_metrics.keys()

    # Two held-out turns each, and the first ones of new conversations; none ends with the end of text.
    prompts = [
        {"input_ids": torch.tensor([ids]), "attention_mask": torch.ones(1, len(ids), dtype=torch.long)}
        for word in CALLS
        for chat in ([], [{"role": "user", "content": CALLS[3]}, {"role": "assistant", "content": REPLIES[CALLS[3]]}])
        for ids in [
            chat_tokenizer.encode(
                "".join(f"<|im_start|>{m['role']}\n{m['content']}<|im_end|>\n" for m in chat)
                + f"<|im_start|>user\n{word}<|im_end|>\n<|im_start|>assistant\n"
            )
        ]
    ]
    exported = AutoModelForCausalLM.from_pretrained(export.exported)
    assert exported.generation_config.eos_token_id == [chat_tokenizer.eos_token_id, end]
    student.student.model.eval()
    teacher.eval()
    for number, prompt in enumerate(prompts):
        ours = student.generate(prompt, max_new_tokens=10)[0].tolist()
        assert ours[-1] == end and chat_tokenizer.decode(ours[:-1]) == REPLIES[CALLS[number // 2]]
        length = prompt["input_ids"].shape[1]
        theirs = teacher.generate(**prompt, max_new_tokens=10, eos_token_id=end, pad_token_id=0, do_sample=False)
        assert ours == theirs[0, length:].tolist()
        assert ours == exported.generate(**prompt, max_new_tokens=10)[0, length:].tolist()

    # Of a held-out conversation the last turn is the reference, for a test as for the answers that are logged.
    trainer.test(student, data, verbose=False)
    records = read_answers(tmp_path / "answers.jsonl")
    assert len(records) == 6 and not any(record["cut"] for record in records)
    assert all(r["references"] == [REPLIES[r["messages"][-1]["content"]]] for r in records)
    assert all([record["answer"]] == record["references"] for record in records)
    sampled = [json.loads(line) for line in (tmp_path / "logs/answers.jsonl").read_text().splitlines()][-3:]
    assert all(row["answer"] == row["reference"] == REPLIES[row["prompt"].split()[-2]] for row in sampled)
    assert all(row["prompt"].split().count("assistant") == 2 for row in sampled), "the first turn is in the prompt"
