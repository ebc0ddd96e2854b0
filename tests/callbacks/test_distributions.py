from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Trainer
from lightning.pytorch.loggers import TensorBoardLogger
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from transformers import PreTrainedTokenizerFast

from akl_lightning.callbacks import DistributionPlot, distributions, draw_distributions
from akl_lightning.callbacks.distributions import distinct_words
from akl_lightning.criterion import DistillationCriterion
from akl_lightning.data.module import InstructionDataModule
from akl_lightning.errors import UsageError
from akl_lightning.module import DistillationModule
from tests import references
from tests.conftest import QUIET, gpt2, write


@pytest.mark.parametrize("cached", [False, True])
def test_the_two_distributions_at_one_position_are_drawn_after_every_validation(
    data: InstructionDataModule, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cached: bool
) -> None:
    drawn: list[tuple[Any, dict[str, str]]] = []

    def draw(*bars: Any, **texts: str) -> Any:
        drawn.append((bars, texts))
        return draw_distributions(*bars, **texts)

    monkeypatch.setattr(distributions, "draw_distributions", draw)
    original = gpt2(24)
    teacher = write(original, tmp_path / "cache", data, codec="bfloat16") if cached else original
    settings = {**QUIET, "logger": TensorBoardLogger(tmp_path, "", "")}
    module = DistillationModule(gpt2(16), teacher, optimizer=partial(torch.optim.SGD, lr=0.0))
    trainer = Trainer(**settings, max_epochs=2, callbacks=[DistributionPlot(position=2)])
    trainer.fit(module, data)
    assert len(EventAccumulator(str(tmp_path)).Reload().Images("distributions")) == 2
    assert len(drawn) == 2 and drawn[0] == drawn[1]

    (batch,) = data.val_dataloader()
    where = module.criterion.response_positions(batch["labels"][:1])[0][2]
    read = batch["input_ids"][:1, : where + 1]
    logits = [model.eval()(read).logits[0, -1] for model in (original, module.student.model)]
    p, q = (row.softmax(-1) for row in logits)
    head, _ = references.membership(logits[0], p.double(), 0.5, "cover")
    (words, student, teachers, in_head), texts = drawn[0]
    tokens = p.argsort(descending=True)
    assert teachers == sorted(teachers, reverse=True) and len(words) == len(student) == len(in_head) == 12
    assert max(teachers) == pytest.approx(p.max().item(), rel=0.02 if cached else 1e-4)
    assert max(student) == pytest.approx(q.max().item(), rel=1e-4)
    assert in_head[0] and head[tokens[0]] == 1
    assert f" of {len(data.tokenizer)} tokens" in texts["head"]
    assert texts["context"] == data.tokenizer.decode(read[0])
    assert texts["expected"] == distributions.word(data.tokenizer, batch["input_ids"][0, where + 1].item())


def test_bars_for_both_and_a_band_behind_the_head() -> None:
    figure = draw_distributions(
        ["$a$", "b", "c"], [0.1, 0.6, 0.3], [0.5, 0.3, 0.2], [True, False, False], "head: 1", "said " * 40, "b"
    )
    (axes,) = figure.axes
    assert axes.get_xlabel() == "probability"
    assert [label.get_text() for label in axes.get_yticklabels()] == ["$a$", "b", "c"]
    teacher, student = axes.containers
    assert [bar.get_width() for bar in teacher] == [0.5, 0.3, 0.2]
    assert [bar.get_width() for bar in student] == [0.1, 0.6, 0.3]
    bands = [patch for patch in axes.patches if patch not in (*teacher, *student)]
    assert len(bands) == 1 and bands[0].get_y() == -0.5
    (legend,) = figure.legends
    assert [text.get_text() for text in legend.get_texts()] == ["head: 1", "teacher, p", "student, q"]
    title = axes._left_title.get_text()
    assert title.endswith("In the data:  b") and "After:  …" in title and max(map(len, title.splitlines())) < 80


def test_words_that_look_alike_are_told_apart(tokenizer: PreTrainedTokenizerFast) -> None:
    vocabulary = tokenizer.get_vocab()
    assert distinct_words(tokenizer, [vocabulary["s"], vocabulary["Ġs"], vocabulary["Ġand"]]) == ["s", "␣s", "and"]


def test_misuse_is_reported_before_training(data: InstructionDataModule, tmp_path: Path) -> None:
    settings = {**QUIET, "logger": TensorBoardLogger(tmp_path, "", "")}
    alone = DistillationModule(gpt2(16), criterion=DistillationCriterion(alpha=0.0))
    with pytest.raises(UsageError, match="DistributionPlot needs a DistillationModule with a teacher"):
        Trainer(**settings, callbacks=[DistributionPlot()]).fit(alone, data)
    with pytest.raises(UsageError, match="position must be 0 or more, got -1"):
        DistributionPlot(-1)
    with pytest.raises(UsageError, match="the module has no teacher"):
        alone.distributions({}, slice(1))
