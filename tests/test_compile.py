"""``compile_chunks`` in processes of their own: one with a compiler, one without."""

import os
import shutil
import subprocess
import sys

import pytest

SCRIPT = """
import warnings
import torch
from akl_lightning.criterion import DistillationCriterion

torch.manual_seed(0)
student, teacher, labels = torch.randn(12, 70, requires_grad=True), 3 * torch.randn(12, 70), torch.arange(12)
DistillationCriterion()(student, teacher, labels).loss.backward()
expected, student.grad = student.grad, None
criterion = DistillationCriterion(compile_chunks=True, chunk_size=6)
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    for _ in range(2):
        student.grad = None
        criterion(student, teacher, labels).loss.backward()
assert torch.allclose(student.grad, expected, atol=1e-6)
messages = [str(warning.message) for warning in caught if "compile_chunks is off" in str(warning.message)]
print(len(messages), criterion.compile_chunks)
"""


def run(**environment: str) -> str:
    command = [sys.executable, "-c", SCRIPT]
    result = subprocess.run(
        command, capture_output=True, text=True, timeout=300, env={**os.environ, **environment}, check=False
    )
    assert result.returncode == 0, result.stderr[-3000:]
    return result.stdout.strip()


@pytest.mark.skipif(shutil.which("g++") is None, reason="no C++ compiler")
def test_with_a_compiler(tmp_path) -> None:
    assert run(TORCHINDUCTOR_CACHE_DIR=str(tmp_path)) == "0 True"


def test_without_a_compiler_it_warns_once_and_goes_on(tmp_path) -> None:
    assert run(TORCHINDUCTOR_CACHE_DIR=str(tmp_path), CXX="no-such-compiler") == "1 False"
