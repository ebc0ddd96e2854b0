"""Figures, tables of texts and histograms for whatever loggers a Trainer has.

TensorBoard, CSV, Weights & Biases and MLflow take them all; other loggers are passed over. What is drawn again is never
written over what was there: TensorBoard, Weights & Biases and MLflow keep one per step, and files are numbered.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from lightning.pytorch import Trainer
from lightning.pytorch.loggers import CSVLogger, MLFlowLogger, TensorBoardLogger, WandbLogger
from lightning.pytorch.utilities import rank_zero_only
from matplotlib.figure import Figure

from akl_lightning.checkpoint import free_path


@rank_zero_only
def log_figure(trainer: Trainer, name: str, figure: Figure) -> None:
    """Log a figure, on rank 0; a :class:`CSVLogger` gets ``name/step-….png`` beside its metrics.

    Args:
        trainer: whose loggers get it, at its global step.
        name: tag of the figure.
        figure: what is logged.
    """
    step = trainer.global_step
    for logger in trainer.loggers:
        if isinstance(logger, TensorBoardLogger):
            logger.experiment.add_figure(name, figure, step)
        elif isinstance(logger, WandbLogger):
            logger.log_image(name, [figure], step)
        elif isinstance(logger, MLFlowLogger):
            assert logger.run_id is not None
            logger.experiment.log_figure(logger.run_id, figure, f"{name}/step-{step:06}.png")
        elif isinstance(logger, CSVLogger):
            path = free_path(_folder(logger) / name / f"step-{step:06}.png")
            path.parent.mkdir(parents=True, exist_ok=True)
            figure.savefig(path)


@rank_zero_only
def log_texts(trainer: Trainer, name: str, rows: Sequence[Mapping[str, str]]) -> None:
    """Log texts, on rank 0; a :class:`CSVLogger` gets a line for each row in ``name.jsonl`` beside its metrics.

    Args:
        trainer: whose loggers get them, at its global step.
        name: tag of the texts.
        rows: texts by heading, the same headings in every row.
    """
    if not rows:
        return
    step = trainer.global_step
    for logger in trainer.loggers:
        if isinstance(logger, TensorBoardLogger):
            logger.experiment.add_text(name, _markdown(rows), step)
        elif isinstance(logger, WandbLogger):
            logger.log_text(name, list(rows[0]), [list(row.values()) for row in rows], step=step)
        elif isinstance(logger, MLFlowLogger):
            assert logger.run_id is not None
            logger.experiment.log_text(logger.run_id, _markdown(rows), f"{name}/step-{step:06}.md")
        elif isinstance(logger, CSVLogger):
            with (_folder(logger) / f"{name}.jsonl").open("a", encoding="utf-8") as file:
                file.writelines(json.dumps({"step": step, **row}, ensure_ascii=False) + "\n" for row in rows)


@rank_zero_only
def log_histogram(trainer: Trainer, name: str, counts: np.ndarray, mean: float, step: int) -> None:
    """Log a histogram of values between 0 and 1, on rank 0; as shares of the bins where a logger has none.

    Args:
        trainer: whose loggers get it.
        name: tag of the histogram.
        counts: values in each of some bins of equal width, ``[bins]``.
        mean: of the values.
        step: at which it is logged.
    """
    edges, total = np.linspace(0, 1, len(counts) + 1), counts.sum()
    for logger in trainer.loggers:
        if isinstance(logger, TensorBoardLogger):
            centres = (edges[1:] + edges[:-1]) / 2
            squares = float(counts @ centres**2)  # which TensorBoard keeps and shows nowhere
            logger.experiment.add_histogram_raw(
                name, 0.0, 1.0, int(total), mean * float(total), squares, edges[1:].tolist(), counts.tolist(), step
            )
        elif isinstance(logger, WandbLogger):
            import wandb  # there, since its logger is

            logger.log_metrics({name: wandb.Histogram(np_histogram=(counts, edges))}, step)
        elif isinstance(logger, CSVLogger | MLFlowLogger):
            shares = zip(edges[:-1], counts / total, strict=True)
            logger.log_metrics({f"{name}/from_{edge:.2f}": float(share) for edge, share in shares}, step)


def _folder(logger: CSVLogger) -> Path:
    logger.experiment  # noqa: B018 (which makes the folder, and warns where it finds one that is not empty)
    return Path(logger.log_dir)


def _markdown(rows: Sequence[Mapping[str, str]]) -> str:
    # Indented, so that nothing in the texts is taken for markdown.
    blocks = [
        f"**{heading}**\n\n" + "\n".join(f"    {line}" for line in (text.splitlines() or [""]))
        for row in rows
        for heading, text in row.items()
    ]
    return "\n\n".join(blocks)
