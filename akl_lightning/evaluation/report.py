"""A table and some answers that compare models on the held-out split."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from lightning.pytorch import Trainer
from rich.box import SIMPLE
from rich.table import Table
from torchmetrics.text import ROUGEScore

from akl_lightning.data.module import InstructionDataModule
from akl_lightning.data.sampler import FILLER
from akl_lightning.module import DistillationModule

COLUMNS = {
    "cross_entropy": "cross\nentropy",
    "perplexity": "perplexity",
    "fkl": "FKL",
    "rkl": "RKL",
    "head_error": "head\nerror",
    "tail_error": "tail\nerror",
    "rouge_l": "ROUGE-L",
}
"""Figures of the report and their headings: nats per token, gaps per token, ROUGE-L in percent."""


def evaluate(
    trainer: Trainer, module: DistillationModule, data: InstructionDataModule
) -> tuple[dict[str, float], list[dict[str, str]]]:
    """Test a module on the held-out split and let its student answer the prompts.

    Args:
        trainer: runs both, on whatever devices it has.
        module: whose student is evaluated against its teacher.
        data: gives the test split.

    Returns:
        The figures of :data:`COLUMNS` by name, and per sample ``prompt``, ``reference`` and ``answer``; the same on
        every rank.
    """
    (means,) = trainer.test(module, data, verbose=False)
    figures = {name.removeprefix("test/"): value for name, value in means.items()}
    figures["perplexity"] = math.exp(figures["cross_entropy"])
    answers = generate_answers(trainer, module, data)
    figures["rouge_l"] = rouge_l(answers)
    return figures, answers


def generate_answers(trainer: Trainer, module: DistillationModule, data: InstructionDataModule) -> list[dict[str, str]]:
    """The student's greedy answers to the test split's prompts, gathered from all ranks."""
    predictions: Any = trainer.predict(module, data)
    mine: dict[int, str] = {}
    # The Trainer may have been told to predict fewer batches.
    for answers, batch in zip(predictions, data.predict_dataloader(), strict=False):
        texts = data.tokenizer.batch_decode(answers, skip_special_tokens=True)
        mine |= dict(zip(batch["index"].tolist(), texts, strict=True))
    gathered: list[dict[int, str]] = [mine]
    if trainer.world_size > 1:
        gathered = [{} for _ in range(trainer.world_size)]
        torch.distributed.all_gather_object(gathered, mine)
    by_index = {index: text for part in gathered for index, text in part.items() if index != FILLER}
    return [
        {
            "prompt": data.splits["test"][index]["prompt"],
            "reference": data.splits["test"][index]["output"],
            "answer": by_index[index].strip(),
        }
        for index in sorted(by_index)
    ]


def rouge_l(answers: Sequence[Mapping[str, str]]) -> float:
    """ROUGE-L of answers to their references: mean F-measure with stemming, times 100.

    >>> rouge_l([{"answer": "the cats sat", "reference": "the cat sat"}])
    100.0
    """
    metric = ROUGEScore(use_stemmer=True, rouge_keys="rougeL")
    metric.update([answer["answer"] for answer in answers], [answer["reference"] for answer in answers])
    return 100 * metric.compute()["rougeL_fmeasure"].item()


def comparison_table(rows: Mapping[str, Mapping[str, float]], title: str) -> Table:
    """The figures of :data:`COLUMNS`, a row per model."""
    table = Table(
        title=title, title_justify="left", box=SIMPLE, pad_edge=False, collapse_padding=True
    )  # fits 80 columns
    table.add_column("model", no_wrap=True)
    for heading in COLUMNS.values():
        table.add_column(heading, justify="right", no_wrap=True)
    for name, figures in rows.items():
        table.add_row(name, *(_number(figures.get(column)) for column in COLUMNS))
    return table


def _number(value: float | None) -> str:
    if value is None:
        return "-"
    return f"{value:.1f}" if value >= 10 else f"{value:.3f}"
