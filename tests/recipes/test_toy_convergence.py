"""The paper's first two claims, in numbers."""

import os
import subprocess
from pathlib import Path

import pytest
import torch

from akl_lightning.divergences import ForwardKL, ReverseKL
from recipes.toy_convergence import descend, errors, teachers
from tests.commands.start import python

RECIPE = Path(__file__).parents[2] / "recipes/toy_convergence.py"


@pytest.mark.parametrize("shape", list(teachers()))
def test_fkl_and_rkl_have_one_optimum_and_both_reach_it(shape: str) -> None:
    teacher = teachers()[shape]
    ends = [descend(teacher, divergence, 3000, 10.0)[-1] for divergence in (ForwardKL(), ReverseKL())]
    for end in ends:
        assert (end - teacher).abs().sum() < 2e-3
    assert (ends[0] - ends[1]).abs().sum() < 3e-3


@pytest.mark.parametrize("learning_rate", [1.0, 3.0, 10.0])
@pytest.mark.parametrize("shape", list(teachers()))
def test_fkl_learns_the_head_first_and_rkl_the_tail(shape: str, learning_rate: float) -> None:
    teacher = teachers()[shape]
    runs = [descend(teacher, divergence, 10, learning_rate) for divergence in (ForwardKL(), ReverseKL())]
    forward, reverse = (errors(students, teacher) for students in runs)
    assert forward[0][0] == reverse[0][0] and forward[1][0] == reverse[1][0], "one start"
    for step in (1, 5, 10):
        assert forward[2][step] > reverse[2][step] + 0.02, "of what FKL has removed, more lies in the head"


def test_head_share_by_hand() -> None:
    teacher = torch.tensor([0.6, 0.2, 0.2], dtype=torch.float64)
    students = torch.tensor([[0.2, 0.4, 0.4], [0.5, 0.3, 0.2]], dtype=torch.float64)
    head, tail, share = errors(students, teacher)
    assert head.tolist() == pytest.approx([0.4, 0.1]) and tail.tolist() == pytest.approx([0.4, 0.1])
    assert share[1].item() == pytest.approx(0.5)


def test_the_recipe_reports_and_overwrites_nothing(tmp_path: Path) -> None:
    command = [python(), str(RECIPE), "--steps", "10", "--shown", "[1, 10]", "--output", "out/toy"]
    for _ in range(2):
        result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, env=os.environ, timeout=120)
        assert result.returncode == 0, result.stderr
        assert len([line for line in result.stdout.splitlines() if "RKL" in line]) == 3 * 2
    pictures = sorted(path.name for path in (tmp_path / "out").iterdir())
    assert pictures == ["toy-v1.png", "toy.png"]
    assert all((tmp_path / "out" / name).read_bytes().startswith(b"\x89PNG") for name in pictures)


def test_steps_that_are_never_made(tmp_path: Path) -> None:
    command = [python(), str(RECIPE), "--steps", "10"]
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, env=os.environ, timeout=120)
    assert result.returncode == 2
    assert "must name steps between 1 and steps = 10" in result.stderr and "Traceback" not in result.stderr
