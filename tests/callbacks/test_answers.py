import json
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Trainer
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from akl_lightning.callbacks import SampledAnswers
from akl_lightning.data.module import InstructionDataModule
from akl_lightning.data.sources import JsonLines
from akl_lightning.errors import UsageError
from akl_lightning.module import DistillationModule
from tests.conftest import PAIRS, QUIET, gpt2
from tests.test_module import Bigram


def test_prompts_references_and_greedy_answers_are_logged_each_epoch(
    data: InstructionDataModule, tmp_path: Path
) -> None:
    loggers = [TensorBoardLogger(tmp_path, "tb", ""), CSVLogger(tmp_path, "csv", "")]
    module = DistillationModule(gpt2(16), gpt2(24), max_new_tokens=6)
    trainer = Trainer(**{**QUIET, "logger": loggers}, max_epochs=2, callbacks=[SampledAnswers(3)])
    trainer.fit(module, data)
    rows = [json.loads(line) for line in (tmp_path / "csv/answers.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [trainer.global_step // 2] * 3 + [trainer.global_step] * 3
    assert [row["prompt"] for row in rows[:3]] == [row["prompt"] for row in rows[3:]]
    references = {pair["instruction"]: pair["output"] for pair in PAIRS}
    for row in rows[3:]:
        assert row["reference"] == references[row["prompt"]]
        prompt = torch.tensor([data.tokenizer(f"{row['prompt']}\n")["input_ids"]])
        answer = module.student.model.eval().generate(prompt, max_new_tokens=6, do_sample=False)[0, prompt.shape[1] :]
        assert row["answer"] == data.tokenizer.decode(answer, skip_special_tokens=True).strip()

    texts = EventAccumulator(str(tmp_path / "tb")).Reload().Tensors("answers/text_summary")
    assert [text.step for text in texts] == [trainer.global_step // 2, trainer.global_step]
    (text,) = texts[-1].tensor_proto.string_val
    assert all(f"    {row['prompt']}" in text.decode() for row in rows[3:])


def test_a_run_without_validation_has_none(tokenizer: Any, corpus: str, tmp_path: Path) -> None:
    data = InstructionDataModule(tokenizer, JsonLines(corpus), max_length=40, validation_size=0)
    settings = {**QUIET, "logger": CSVLogger(tmp_path, "", "")}
    module = DistillationModule(gpt2(16), gpt2(24), max_new_tokens=6)
    Trainer(**settings, max_steps=1, callbacks=[SampledAnswers()]).fit(module, data)
    assert not (tmp_path / "answers.jsonl").exists()


def test_misuse_is_reported_before_training(data: InstructionDataModule, tmp_path: Path) -> None:
    settings = {**QUIET, "logger": TensorBoardLogger(tmp_path, "", "")}
    with pytest.raises(UsageError, match="SampledAnswers needs a student that can generate, Bigram has no generate"):
        Trainer(**settings, callbacks=[SampledAnswers()]).fit(DistillationModule(Bigram(), gpt2(24)), data)
    with pytest.raises(UsageError, match=r"tokens, and an answer of model.max_new_tokens = 64 are beyond the 64 pos"):
        Trainer(**settings, callbacks=[SampledAnswers()]).fit(
            DistillationModule(gpt2(16), gpt2(24), max_new_tokens=64), data
        )
    with pytest.raises(UsageError, match="SampledAnswers needs a tokenizer"):
        Trainer(**settings, callbacks=[SampledAnswers()]).fit(DistillationModule(gpt2(16), gpt2(24)), [{}])
    with pytest.raises(UsageError, match="answers must be 1 or more, got 0"):
        SampledAnswers(0)
