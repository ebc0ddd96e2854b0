"""What the teacher is surprised at in the student's own answers."""

import json
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Trainer
from lightning.pytorch.loggers import CSVLogger

from akl_lightning.callbacks import SampledAnswers, answers
from akl_lightning.callbacks.strips import Strip
from akl_lightning.callbacks.surprise import draw_surprise
from akl_lightning.data.module import InstructionDataModule
from akl_lightning.data.sources import JsonLines
from akl_lightning.module import DistillationModule
from akl_lightning.rollouts import OnPolicy, Sampling
from tests.conftest import QUIET, gpt2


def test_rollouts_are_shown_with_the_teachers_surprise(
    data: InstructionDataModule, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn: list[list[Strip]] = []

    def draw(strips: list[Strip]) -> Any:
        drawn.append(strips)
        return draw_surprise(strips)

    monkeypatch.setattr(answers, "draw_surprise", draw)
    seen: list[dict[str, torch.Tensor]] = []
    surprises = answers.surprises
    monkeypatch.setattr(answers, "surprises", lambda module, batch: seen.append(batch) or surprises(module, batch))
    module = DistillationModule(
        gpt2(16), gpt2(24), optimizer=partial(torch.optim.SGD, lr=0.0), on_policy=OnPolicy(0.5, Sampling(6))
    )
    settings = {**QUIET, "logger": CSVLogger(tmp_path)}
    trainer = Trainer(**settings, max_epochs=2, limit_train_batches=2, callbacks=[SampledAnswers(2)])
    trainer.fit(module, data)
    assert len(drawn) == 2 and drawn[0] == drawn[1] and len(drawn[0]) == 2  # the same draws of the same student
    ids, mask, labels = (seen[0][name] for name in ("input_ids", "attention_mask", "labels"))
    with torch.no_grad():
        log_p = module.teacher.model.model(ids, attention_mask=mask).logits.log_softmax(-1)
    for row, strip in enumerate(drawn[0]):
        places = (labels[row] != -100).nonzero().flatten()
        expected = [-log_p[row, place - 1, ids[row, place]].item() for place in places]
        assert 0 < len(places) <= 6 and strip.values == pytest.approx(expected, rel=1e-4)
        assert strip.prompt in data.tokenizer.decode(ids[row])
    files = [path.name for path in tmp_path.rglob("*.png")]
    assert len(files) == 2 and list(tmp_path.rglob("rollout_surprise"))
    lines = next(tmp_path.rglob("answers.jsonl")).read_text().splitlines()
    assert len(lines) == 4


def test_prompts_alone_are_shown_and_no_filler(tokenizer: Any, tmp_path: Path) -> None:
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps({"prompt": f"Say {n}"}) + "\n" for n in range(9)))
    data = InstructionDataModule(
        tokenizer, JsonLines(str(tmp_path / "prompts.jsonl")), batch_size=4, max_length=40, validation_size=3
    )
    module = DistillationModule(gpt2(16), gpt2(24), on_policy=OnPolicy(0.5, Sampling(6)))
    settings = {**QUIET, "logger": CSVLogger(tmp_path)}
    callback = SampledAnswers(8)
    trainer = Trainer(**settings, max_epochs=1, limit_train_batches=1, callbacks=[callback])
    trainer.fit(module, data)
    rows = [json.loads(line) for line in next(tmp_path.rglob("answers.jsonl")).read_text().splitlines()]
    prompts = data.splits["validation"]["prompt"]
    assert [row["prompt"] for row in rows] == [prompt.strip() for prompt in prompts] and len(rows) == 3
    assert {row["reference"] for row in rows} == {""} and any(row["answer"] for row in rows)
    assert list(tmp_path.rglob("rollout_surprise"))
    batch = next(iter(data.val_dataloader()))
    callback.found.clear()
    callback.look_at(trainer, module, None, {**batch, "index": torch.tensor([0, -1, 2])}, 8)
    assert len(callback.found) == 2  # the second is there for the sake of other ranks


def test_a_strip_for_each_answer() -> None:
    *strips, bar = draw_surprise([Strip("one", ["a", "b"], [0.0, 20.0]), Strip("two", ["c"], [1.0])]).axes
    assert [len(axes.images) for axes in strips] == [1, 1]
    assert [tick.get_text() for tick in bar.get_xticklabels()] == ["0: expected", "the teacher's surprise, nats", "8+"]
