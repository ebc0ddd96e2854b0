from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Trainer
from lightning.pytorch.loggers import TensorBoardLogger
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from akl_lightning.callbacks import HeadWeightMap, draw_weight_map, weight_map
from akl_lightning.callbacks.strips import Strip
from akl_lightning.data.module import InstructionDataModule
from akl_lightning.errors import UsageError
from akl_lightning.module import DistillationModule
from tests import references
from tests.conftest import QUIET, gpt2


def test_the_weights_of_the_same_answers_are_drawn_after_every_validation(
    data: InstructionDataModule, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn: list[list[Strip]] = []

    def draw(answers: list[Strip]) -> Any:
        drawn.append(list(answers))
        return draw_weight_map(answers)

    monkeypatch.setattr(weight_map, "draw_weight_map", draw)
    data.validation_size, data.batch_size = 6, 2  # three batches
    settings = {**QUIET, "logger": TensorBoardLogger(tmp_path, "", "")}
    trainer = Trainer(**settings, max_epochs=2, callbacks=[HeadWeightMap(3)])
    # With a learning rate of 0, what is found after the run is what was there.
    module = DistillationModule(gpt2(16), gpt2(24), optimizer=partial(torch.optim.SGD, lr=0.0))
    trainer.fit(module, data)

    events = EventAccumulator(str(tmp_path)).Reload()
    assert [image.step for image in events.Images("head_weight_map")] == [trainer.global_step // 2, trainer.global_step]
    assert len(drawn) == 2 and drawn[0] == drawn[1] and len(drawn[0]) == 3
    batches = list(data.val_dataloader())
    for answer, batch in zip(drawn[0], batches, strict=True):  # one of each
        row = {key: value[:1] for key, value in batch.items()}
        positions, labels = module.criterion.response_positions(row["labels"])
        with torch.no_grad():
            student = module.student.model.eval()(row["input_ids"]).logits.flatten(0, 1)[positions]
            teacher = module.teacher.model.model(row["input_ids"]).logits.flatten(0, 1)[positions]
        statistics, _, _ = references.compare(student, teacher, labels, "adaptive_kl")
        assert answer.values == pytest.approx(statistics["head_weight"].tolist(), abs=1e-4)
        assert len(answer.words) == len(labels) and answer.words[-1] == "[end]"
        assert answer.prompt.strip() in data.tokenizer.decode(row["input_ids"][0])


def test_a_strip_for_each_answer_with_words_under_it() -> None:
    answers = [
        Strip("one", ["a", "$b$", "c"], [0.0, 0.5, 1.0]),
        Strip("two", [f"w{index}" for index in range(40)], [0.5] * 40),
    ]
    figure = draw_weight_map(answers)
    *strips, bar = figure.axes
    assert [len(axes.images) for axes in strips] == [1, 1]
    assert strips[0].images[0].get_array().tolist() == [[0.0, 0.5, 1.0]]
    assert [label.get_text() for label in strips[0].get_xticklabels()] == ["a", "$b$", "c"]
    assert [label.get_text() for label in strips[1].get_xticklabels()] == [f"w{index}" for index in range(24)]
    assert strips[0]._left_title.get_text() == "one"
    assert strips[1]._left_title.get_text() == "two  (first 24 of 40 tokens)"
    assert strips[0].images[0].get_clim() == (0, 1)
    assert [label.get_text() for label in bar.get_xticklabels()] == ["0: tail, RKL", "head weight", "1: head, FKL"]


def test_misuse_is_reported_before_training(data: InstructionDataModule, tmp_path: Path) -> None:
    logger = TensorBoardLogger(tmp_path, "", "")
    module = DistillationModule(gpt2(16), gpt2(24))
    with pytest.raises(UsageError, match="HeadWeightMap needs a logger"):
        Trainer(**QUIET, callbacks=[HeadWeightMap()]).fit(module, data)
    with pytest.raises(UsageError, match="HeadWeightMap needs a tokenizer to write words: give the Trainer a data"):
        Trainer(**{**QUIET, "logger": logger}, callbacks=[HeadWeightMap()]).fit(module, [{}])
    with pytest.raises(UsageError, match="answers must be 1 or more, got 0"):
        HeadWeightMap(0)
