"""Figures, texts and histograms in what CSV, W&B and MLflow keep; TensorBoard's are looked at with each callback."""

import json
from pathlib import Path

import numpy as np
import pytest
from lightning.pytorch import Trainer
from lightning.pytorch.loggers import CSVLogger, Logger, MLFlowLogger, WandbLogger
from matplotlib.figure import Figure
from matplotlib.image import imread

from akl_lightning.callbacks.figures import blank_figure
from akl_lightning.callbacks.loggers import log_figure, log_histogram, log_texts
from tests.conftest import QUIET

ROWS = [{"prompt": "a\n# b", "answer": "c"}, {"prompt": "d", "answer": ""}]


def figure() -> Figure:
    figure = blank_figure(2, 1)
    figure.add_subplot().plot([1, 2], [3, 4])
    return figure


def log_all(logger: Logger) -> None:
    trainer = Trainer(**{**QUIET, "logger": logger})
    log_figure(trainer, "figure", figure())
    log_texts(trainer, "texts", ROWS)
    log_histogram(trainer, "histogram", np.array([1.0, 3.0]), 0.6, 0)
    logger.finalize("success")


def test_csv_keeps_files_beside_its_metrics_and_overwrites_none(tmp_path: Path) -> None:
    logger = CSVLogger(tmp_path, "csv", "")
    log_all(logger)
    log_all(logger)
    names = {str(path.relative_to(tmp_path / "csv")) for path in tmp_path.rglob("*") if path.is_file()}
    assert names == {"figure/step-000000.png", "figure/step-000000-v1.png", "texts.jsonl", "metrics.csv"}
    assert imread(tmp_path / "csv/figure/step-000000.png").shape == (150, 300, 4)
    lines = [json.loads(line) for line in (tmp_path / "csv/texts.jsonl").read_text().splitlines()]
    assert lines == 2 * [{"step": 0, **row} for row in ROWS]
    header, first, *_ = (tmp_path / "csv/metrics.csv").read_text().splitlines()
    assert header == "histogram/from_0.00,histogram/from_0.50,step" and first == "0.25,0.75,0"


def test_weights_and_biases(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_SILENT", "true")
    logger = WandbLogger("run", save_dir=tmp_path, offline=True)
    log_all(logger)
    summary = dict(logger.experiment.summary)
    logger.experiment.finish()
    (image,) = tmp_path.rglob("media/images/figure_*.png")
    assert imread(image).shape == (150, 300, 4)
    (table,) = tmp_path.rglob("media/table/texts_*.table.json")
    assert json.loads(table.read_text()) == {
        "columns": ["prompt", "answer"],
        "data": [list(row.values()) for row in ROWS],
    } | {key: value for key, value in json.loads(table.read_text()).items() if key not in ("columns", "data")}
    assert summary["histogram"]["values"] == [1, 3] and summary["histogram"]["bins"] == [0, 0.5, 1]


def test_mlflow(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("mlflow")
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    logger = MLFlowLogger("experiment", tracking_uri=f"file:{tmp_path}")
    log_all(logger)
    (image,) = tmp_path.rglob("artifacts/figure/step-000000.png")
    assert imread(image).shape == (150, 300, 4)
    (texts,) = tmp_path.rglob("artifacts/texts/step-000000.md")
    assert "**prompt**\n\n    a\n    # b\n\n**answer**\n\n    c" in texts.read_text()
    metrics = logger.experiment.get_run(logger.run_id).data.metrics
    assert metrics == {"histogram/from_0.00": 0.25, "histogram/from_0.50": 0.75}
