"""A user's own student, which is no transformers model."""

import os
import subprocess
from pathlib import Path

import torch
from lightning.pytorch import Trainer

from akl_lightning.data.module import InstructionDataModule
from akl_lightning.module import DistillationModule
from recipes.own_student import RecurrentLM
from tests.commands.start import python
from tests.conftest import QUIET, gpt2
from tests.test_module import parameters

RECIPE = Path(__file__).parents[2] / "recipes/own_student.py"


def module() -> DistillationModule:
    torch.manual_seed(1)
    return DistillationModule(
        RecurrentLM(300, 16), gpt2(24), optimizer=lambda parameters: torch.optim.AdamW(parameters, 1e-2)
    )


def test_it_learns_and_resumes(data: InstructionDataModule, tmp_path: Path) -> None:
    (before,) = Trainer(**QUIET).validate(module(), data, verbose=False)
    whole, resumed = module(), module()
    trainer = Trainer(**QUIET, max_epochs=3)
    trainer.fit(whole, data)
    assert trainer.callback_metrics["val/loss"] < before["val/loss"] - 0.2
    stopped = Trainer(**QUIET, max_epochs=1)
    stopped.fit(module(), data)
    stopped.save_checkpoint(tmp_path / "one.ckpt")
    Trainer(**QUIET, max_epochs=3).fit(resumed, data, ckpt_path=tmp_path / "one.ckpt")
    assert torch.equal(parameters(resumed.student), parameters(whole.student))


def test_answers_are_greedy_and_padding_on_the_left_does_not_count() -> None:
    model = RecurrentLM(300, 16)
    prompt = torch.randint(1, 300, (1, 5))
    ids = prompt
    for _ in range(4):
        ids = torch.cat([ids, model({"input_ids": ids})[:, -1:].argmax(-1)], 1)
    padded = torch.cat([torch.zeros(1, 3, dtype=torch.long), prompt], 1)
    mask = torch.tensor([[0, 0, 0, 1, 1, 1, 1, 1]])
    assert torch.equal(model.generate(padded, mask, max_new_tokens=4)[:, 8:], ids[:, 5:])


def test_the_recipe_runs(tokenizer, corpus: str, tmp_path: Path) -> None:
    gpt2(24, positions=256).save_pretrained(tmp_path / "large")
    tokenizer.save_pretrained(tmp_path / "large")
    command = [python(), str(RECIPE), "--teacher", "large", "--pairs", corpus, "--width", "16"]
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, env=os.environ, timeout=300)
    assert result.returncode == 0, result.stderr[-3000:]
    assert "'val/fkl': " in result.stdout
    answers = [line for line in result.stdout.splitlines() if line[:1] in "'\"" and line]
    assert len(answers) == 2, "the test split has two prompts"
