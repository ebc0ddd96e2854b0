"""The recipe as a user runs it, with prompts of their own and a teacher that is there."""

import json
import os
import re
import subprocess
from pathlib import Path

import pytest
import yaml
from transformers import PreTrainedTokenizerFast

from tests.commands.start import python
from tests.conftest import PAIRS, gpt2

RECIPE = Path(__file__).parents[2] / "recipes/on_policy.py"


@pytest.mark.parametrize("gpu", [False, True])
def test_a_warm_start_then_on_policy(tmp_path: Path, tokenizer: PreTrainedTokenizerFast, gpu: bool) -> None:
    """Of the GPU's setting all that a CPU can do, with small models."""
    gpt2(24, len(tokenizer)).save_pretrained(tmp_path / "teacher")
    tokenizer.save_pretrained(tmp_path / "teacher")
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(pair) + "\n" for pair in PAIRS))
    student = {"model_type": "gpt2", "n_layer": 1, "n_embd": 16, "n_head": 2, "n_positions": 64, "vocab_size": 300}
    if gpu:
        setting = RECIPE.with_name("on_policy_gpu.yaml")
        student = yaml.safe_load(setting.read_text())["model"]["student"]
        student |= {"num_hidden_layers": 1, "hidden_size": 28, "intermediate_size": 16, "vocab_size": 300}
    student |= {"bos_token_id": 0, "eos_token_id": 0}
    command = [python(), str(RECIPE), *(["--config", str(setting), "--trainer.accelerator", "cpu"] if gpu else [])]
    command += ["--model.teacher", "teacher", "--data.tokenizer", "teacher", "--model.student", json.dumps(student)]
    command += ["--data.source", "JsonLines", "--data.source.path", "pairs.jsonl"]
    command += ["--data.batch_size", "4" if gpu else "8", "--data.max_length", "40", "--model.max_new_tokens", "6"]
    command += ["--model.on_policy.decoding.max_new_tokens", "6"]
    command += [] if gpu else ["--model.on_policy.refresh_every", "2"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=240, env={**os.environ})
    assert done.returncode == 0, done.stderr[-3000:]
    said = [done.stdout.index(part) for part in ("Warm start", "Distillation", "Sampling: ", "student after")]
    assert said == sorted(said)
    run = tmp_path / "runs/on_policy"
    assert (run / "student/config.json").exists() and (run / "checkpoints/last.ckpt").exists()
    config = yaml.safe_load((run / "config.yaml").read_text())
    assert (config["trainer"]["precision"], config["model"]["on_policy"]["refresh_every"]) == (
        ("bf16-mixed", 4) if gpu else (None, 2)
    )
    done = subprocess.run([*command, "--model.on_policy.share", "0"], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 2 and "give model.on_policy.share above 0" in done.stderr


def test_prompts_alone_without_a_warm_start(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    for name, width in (("teacher", 24), ("student", 16)):
        gpt2(width, len(tokenizer)).save_pretrained(tmp_path / name)
        tokenizer.save_pretrained(tmp_path / name)
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps({"prompt": f"Say {n}"}) + "\n" for n in range(12)))
    command = [python(), str(RECIPE), "--model.teacher", "teacher", "--data.tokenizer", "teacher"]
    command += ["--model.student", "student", "--data.source", "JsonLines", "--data.source.path", "prompts.jsonl"]
    command += [
        "--data.max_length",
        "40",
        "--model.max_new_tokens",
        "6",
        "--model.on_policy.decoding.max_new_tokens",
        "6",
    ]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=240)
    assert done.returncode == 2 and "answer the prompts from the first step on (model.on_policy)" in done.stderr
    done = subprocess.run([*command, "--warm_epochs", "0"], cwd=tmp_path, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr[-3000:]
    assert (
        "ModelCheckpoint watches val/divergence, which has no value" in done.stderr and "student after" in done.stdout
    )
    said = done.stdout.partition("The held-out split holds prompts alone, with no response to measure anything on.")[2]
    assert "nan" not in said and "reference:" not in said and all(len(line) <= 80 for line in said.splitlines()[:9])
    assert re.search(r"rollout *\n model +RKL *\n[ ─]+\n student before +\d\.\d{3} *\n student after +\d", said)
    (report,) = tmp_path.glob("runs/*/report.json")
    figures = json.loads(report.read_text())["figures"]
    assert all(value == value for row in figures.values() for value in row.values())
    assert ["rollout_rkl" in figures[row] for row in ("student before", "student after", "teacher")] == [1, 1, 0]
