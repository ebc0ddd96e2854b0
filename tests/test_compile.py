"""The student's compiled body, in processes with a compiler and without."""

import os
import shutil
import subprocess
import sys

import pytest

BODY = """
import copy
import sys
import torch
from lightning.pytorch import Trainer
from akl_lightning.errors import UsageError
from akl_lightning.module import DistillationModule
from akl_lightning.rollouts import ContinuousBatching, Sampling, Weights
from tests.conftest import QUIET, gpt2
from tests.test_module import SGD, loader, parameters, samples, stack

torch.manual_seed(0)
student, teacher = gpt2(16), gpt2(24)
rows = samples()
# Of two lengths, and as a collator gives them: without gaps, for which everything would be compiled once more.
shorter = {key: value[:, :17].contiguous() for key, value in stack(rows[4:]).items()}
batches = [stack(rows[:5]), shorter, stack(rows[2:])]
ends, start = [], parameters(student)
for compiled in (False, True):
    module = DistillationModule(copy.deepcopy(student), teacher, compile=compiled, **SGD)
    try:
        Trainer(**QUIET, max_epochs=2).fit(module, loader(batches))
    except UsageError as error:
        print(error)
        sys.exit()
    ends.append(parameters(module.student))
    prompts = {"input_ids": rows[0]["input_ids"][:, :5], "attention_mask": torch.ones(1, 5, dtype=torch.long)}
    module.eval()
    frames = torch._dynamo.utils.counters["frames"]["ok"]
    module.generate(prompts, max_new_tokens=8, do_sample=False)
    engine = ContinuousBatching(0.01)
    engine.refresh(Weights(module.student, (0,), 0))
    engine.generate([[5, 6, 7], [8]], Sampling(8), [1, 2])
    engine.release()
    assert torch._dynamo.utils.counters["frames"]["ok"] == frames, "answers are not compiled"
assert frames > 0, "the body is"
assert list(module.state_dict()) == list(DistillationModule(student, teacher).state_dict())
assert copy.deepcopy(module).distill(batches[0]).loss.item() > 0
print(((ends[0] - ends[1]).norm() / (ends[0] - start).norm()).item() < 1e-4)
"""


def run(script: str, **environment: str) -> str:
    command = [sys.executable, "-c", script]
    result = subprocess.run(
        command, capture_output=True, text=True, timeout=300, env={**os.environ, **environment}, check=False
    )
    assert result.returncode == 0, result.stderr[-3000:]
    return result.stdout.strip()


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="no C++ compiler")
def test_a_compiled_student_is_updated_like_an_eager_one(tmp_path) -> None:
    assert run(BODY, TORCHINDUCTOR_CACHE_DIR=str(tmp_path)) == "True"


def test_a_student_that_cannot_be_compiled_says_so(tmp_path) -> None:
    said = run(BODY, TORCHINDUCTOR_CACHE_DIR=str(tmp_path), CXX="no-such-compiler")
    assert said.startswith("torch.compile cannot compile GPT2LMHeadModel here (")
    assert said.endswith("set model.compile to false.")
