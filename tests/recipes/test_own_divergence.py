"""A user's own divergence: in the criterion, in the recipe's process, and named on the command line."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml

from akl_lightning import functional as F
from akl_lightning.criterion import DistillationCriterion
from recipes.own_divergence import AlphaDivergence
from tests.commands.start import python
from tests.conftest import gpt2

ROOT = Path(__file__).parents[2]


@pytest.fixture
def models(tokenizer, tmp_path: Path) -> Path:
    """Folders of a teacher and a student, each with the tokenizer."""
    for name, width, layers in (("large", 24, 2), ("small", 16, 1)):
        gpt2(width, positions=256, layers=layers).save_pretrained(tmp_path / name)
        tokenizer.save_pretrained(tmp_path / name)
    return tmp_path


def run(command: list[str], folder: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, **environment}
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, env=environment, timeout=300)


def test_its_limits_are_reverse_and_forward_kl() -> None:
    student, teacher = (torch.randn(5, 30, dtype=torch.float64).log_softmax(-1) for _ in range(2))
    near = {order: AlphaDivergence(order).compare(student, teacher) for order in (1e-6, 1 - 1e-6)}
    assert torch.allclose(near[1e-6], F.reverse_kl_from_log_probs(student, teacher), atol=1e-4)
    assert torch.allclose(near[1 - 1e-6], F.forward_kl_from_log_probs(student, teacher), atol=1e-4)


def test_chunks_and_statistics_come_for_free() -> None:
    logits = {"student": torch.randn(12, 30), "teacher": torch.randn(12, 30)}
    labels = torch.arange(12)
    gradients = []
    for chunk_size in (None, 5):
        student = logits["student"].clone().requires_grad_()
        criterion = DistillationCriterion(AlphaDivergence(0.3), alpha=1.0, chunk_size=chunk_size)
        output = criterion(student, logits["teacher"], labels)
        output.loss.backward()
        gradients.append(student.grad)
    dense = logits["student"].clone().requires_grad_()
    value = AlphaDivergence(0.3)(dense, logits["teacher"])
    value.sum().backward()
    assert torch.allclose(output.statistics["divergence"], value, atol=1e-5)
    assert output.statistics["head_gap"].shape == (12,)
    for gradient in gradients:
        assert torch.allclose(gradient, dense.grad, atol=1e-5)


def test_the_recipe_runs(models: Path, corpus: str) -> None:
    command = [python(), str(ROOT / "recipes/own_divergence.py"), "--teacher", "large", "--pairs", corpus]
    result = run([*command, "--order", "0.3", "--batch_size", "8"], models)
    assert result.returncode == 0, result.stderr[-3000:]
    assert "'val/divergence': " in result.stdout and "'val/head_error': " in result.stdout


def test_it_is_named_on_the_command_line(models: Path, corpus: str) -> None:
    arguments = {
        "--model.student": "small", "--model.teacher": "large", "--data.tokenizer": "large",
        "--data.source": "JsonLines", "--data.source.path": corpus, "--data.batch_size": "8",
        "--model.criterion.divergence": "recipes.own_divergence.AlphaDivergence",
        "--model.criterion.divergence.order": "0.3",
        "--trainer.max_epochs": "1", "--trainer.accelerator": "cpu", "--trainer.logger": "CSVLogger",
        "--trainer.logger.save_dir": "logs",
    }  # fmt: skip
    # As it is installed, from its start to its end; other tests of commands leave out the imports.
    akl = Path(sys.executable).with_name("akl")
    command = [str(akl), "fit", *(part for pair in arguments.items() for part in pair)]
    result = run(command, models, PYTHONPATH=str(ROOT))
    assert result.returncode == 0, result.stderr[-3000:]
    (config,) = models.glob("logs/**/config.yaml")
    assert yaml.safe_load(config.read_text())["model"]["criterion"]["divergence"] == {
        "class_path": "recipes.own_divergence.AlphaDivergence",
        "init_args": {"order": 0.3},
    }
    (metrics,) = models.glob("logs/**/metrics.csv")
    assert "val/divergence" in metrics.read_text().splitlines()[0]
