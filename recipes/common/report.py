"""Figures of models on the held-out split, and a table that compares them."""

import math
from collections.abc import Mapping
from pathlib import Path

from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import ProgressBar
from rich.box import SIMPLE
from rich.table import Table

from akl_lightning.data.module import InstructionDataModule
from akl_lightning.errors import UsageError
from akl_lightning.evaluation.answers import Record
from akl_lightning.evaluation.decoding import Decoding
from akl_lightning.evaluation.generate import AnswerEvaluation
from akl_lightning.module import DistillationModule

COLUMNS = {
    "cross_entropy": "cross\nentropy",
    "perplexity": "perplexity",
    "fkl": "FKL",
    "rkl": "RKL",
    "head_error": "head\nerror",
    "tail_error": "tail\nerror",
    "rouge_l": "ROUGE-L",
    "rollout_rkl": "rollout\nRKL",
}
"""Figures of the report and their headings: nats per token, gaps per token, ROUGE-L in percent."""


def evaluate(
    trainer: Trainer, module: DistillationModule, data: InstructionDataModule, path: str | Path, decoding: Decoding
) -> tuple[dict[str, float], list[list[Record]]]:
    """Test a module on the held-out split and let its student answer the prompts.

    Args:
        trainer: runs both, on whatever devices it has.
        module: whose student is evaluated against its teacher.
        data: gives the test split.
        path: the file of the answers, as of :class:`~akl_lightning.evaluation.generate.AnswerEvaluation`.
        decoding: how they are decoded.

    Returns:
        What the test has logged, without ``test/``, and the perplexity; for each sample its answers, one for each seed.
        The same on every rank.
    """
    evaluation = AnswerEvaluation(path, decoding)
    trainer.callbacks.append(evaluation)  # type: ignore[attr-defined]
    try:
        means = trainer.test(module, data, verbose=False)
        if not means:
            raise UsageError("nothing was tested: give trainer.limit_test_batches another value than 0.")
    finally:
        trainer.callbacks.remove(evaluation)  # type: ignore[attr-defined]
    figures = {name.removeprefix("test/"): value for name, value in means[0].items()}
    figures["perplexity"] = math.exp(figures["cross_entropy"])
    return figures, evaluation.answers


def evaluate_rollouts(trainer: Trainer, module: DistillationModule, data: InstructionDataModule) -> dict[str, float]:
    """Look at the student's own answers to the validation split's prompts, where a run does so.

    Args:
        trainer: of its callbacks only the progress bar hears of it.
        module: whose student answers.
        data: gives the validation split.

    Returns:
        ``rollout_rkl``, or nothing.
    """
    callbacks = trainer.callbacks  # type: ignore[attr-defined]
    trainer.callbacks = [one for one in callbacks if isinstance(one, ProgressBar)]  # type: ignore[attr-defined]
    try:
        means = trainer.validate(module, data, verbose=False)
    finally:
        trainer.callbacks = callbacks  # type: ignore[attr-defined]
    measured = means[0].get("val/rollout_rkl") if means else None
    return {} if measured is None else {"rollout_rkl": measured}


def comparison_table(rows: Mapping[str, Mapping[str, float]], title: str) -> Table:
    """The figures of :data:`COLUMNS` that some model has, a row for each model that has any."""
    columns = [name for name in COLUMNS if any(name in figures for figures in rows.values())]
    table = Table(
        title=title, title_justify="left", box=SIMPLE, pad_edge=False, collapse_padding=True
    )  # fits 80 columns
    table.add_column("model", no_wrap=True)
    for column in columns:
        table.add_column(COLUMNS[column], justify="right", no_wrap=True)
    for name, figures in rows.items():
        if figures.keys() & columns:
            table.add_row(name, *(_number(figures.get(column)) for column in columns))
    return table


def _number(value: float | None) -> str:
    if value is None:
        return "-"
    return f"{value:.1f}" if value >= 10 else f"{value:.3f}"
