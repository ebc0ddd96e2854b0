import csv
from pathlib import Path

import pytest
from lightning.pytorch import Trainer
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from akl_lightning.callbacks import AdaptiveWeightMonitor
from akl_lightning.data.module import InstructionDataModule
from akl_lightning.errors import UsageError
from akl_lightning.module import DistillationModule
from tests.conftest import QUIET, gpt2


def test_the_weight_goes_to_every_logger(data: InstructionDataModule, tmp_path: Path) -> None:
    loggers = [TensorBoardLogger(tmp_path, "tb", ""), CSVLogger(tmp_path, "csv", "")]
    trainer = Trainer(**{**QUIET, "logger": loggers}, max_epochs=2, callbacks=[AdaptiveWeightMonitor(every_n_steps=3)])
    trainer.fit(DistillationModule(gpt2(16), gpt2(24)), data)
    events = EventAccumulator(str(tmp_path / "tb"), {"histograms": 0}).Reload()  # 0: keep them all
    points = events.Scalars("train/head_weight_step")
    assert [point.step for point in points] == [3, 6, 9, 12]
    assert all(0 < point.value < 1 for point in points)
    histograms = events.Histograms("train/head_weight_per_token")
    assert [histogram.step for histogram in histograms] == [3, 6, 9, 12]

    with (tmp_path / "csv" / "metrics.csv").open() as lines:
        rows = [row for row in csv.DictReader(lines) if row["train/head_weight_step"]]
    written = [float(row["train/head_weight_step"]) for row in rows]
    assert written == pytest.approx([point.value for point in points], rel=1e-5)
    for point, event in zip(points, histograms, strict=True):
        histogram = event.histogram_value
        assert sum(histogram.bucket) == histogram.num > 0
        # Every token lies in its bin: the mean of the bins' middles is off by half a bin at most.
        middles = [limit - 0.025 for limit in histogram.bucket_limit]
        mean = sum(n * middle for n, middle in zip(histogram.bucket, middles, strict=True)) / histogram.num
        assert mean == pytest.approx(point.value, abs=0.025)
    with (tmp_path / "csv" / "metrics.csv").open() as lines:
        rows = [row for row in csv.DictReader(lines) if row["train/head_weight_per_token/from_0.50"]]
    shares = [[float(row[f"train/head_weight_per_token/from_{bin / 20:.2f}"]) for bin in range(20)] for row in rows]
    expected = [[n / event.histogram_value.num for n in event.histogram_value.bucket] for event in histograms]
    assert shares == [pytest.approx(row, abs=1e-6) for row in expected]


def test_misuse_is_reported_before_training(data: InstructionDataModule) -> None:
    with pytest.raises(UsageError, match="AdaptiveWeightMonitor needs a logger"):
        Trainer(**QUIET, callbacks=[AdaptiveWeightMonitor()]).fit(DistillationModule(gpt2(16), gpt2(24)), data)
    with pytest.raises(UsageError, match="every_n_steps must be 1 or more, got 0"):
        AdaptiveWeightMonitor(0)
