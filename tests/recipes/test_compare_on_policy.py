"""The evidence as a user makes it, at a tiny budget; and the estimator, by hand."""

import csv
import json
import os
import subprocess
from pathlib import Path

import torch
import yaml
from transformers import PreTrainedTokenizerFast

from recipes.compare_on_policy import METHODS, one_token, title
from tests import references
from tests.commands.start import python
from tests.conftest import PAIRS, gpt2
from tests.recipes.test_compare_divergences import SETTING

RECIPE = Path(__file__).parents[2] / "recipes/compare_on_policy.py"


def test_the_estimator_is_right_on_the_mean() -> None:
    student, teacher = torch.randn(2, 1, 7, dtype=torch.float64)
    log_q, mean = student.log_softmax(-1), torch.zeros(1, 7, dtype=torch.float64)
    for token in range(7):
        gradient = torch.empty_like(mean)
        part = one_token(student, teacher, torch.tensor([token]), gradient)
        mean += log_q[0, token].exp() * gradient
        # The same by autograd, with the reward held.
        own = student.clone().requires_grad_()
        reward = (teacher.log_softmax(-1) - log_q)[0, token]
        (-reward * own.log_softmax(-1)[0, token]).backward()
        torch.testing.assert_close(gradient, own.grad)
        torch.testing.assert_close(part["loss"][0], -reward * log_q[0, token])
    own = student.clone().requires_grad_()
    references.reverse_kl(teacher.log_softmax(-1), own.log_softmax(-1)).sum().backward()
    torch.testing.assert_close(mean, own.grad)


def test_methods_are_told_apart() -> None:
    assert len({title(name) for name in METHODS}) == len(METHODS) == 13
    assert title("off_policy_akl") == "off-policy, AKL" and title("on_0.5_rkl") == "on-policy, share 0.5, RKL"


def test_a_comparison_at_a_tiny_budget(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    gpt2(24, len(tokenizer)).save_pretrained(tmp_path / "teacher")
    tokenizer.save_pretrained(tmp_path / "teacher")
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(pair) + "\n" for pair in PAIRS))
    setting = json.loads(json.dumps(SETTING))
    setting["model"]["student"]["vocab_size"] = len(tokenizer)
    setting["data"]["source"] = {"class_path": "JsonLines", "init_args": {"path": str(tmp_path / "pairs.jsonl")}}
    (tmp_path / "setting.yaml").write_text(yaml.safe_dump(setting))
    command = [python(), str(RECIPE), "--teacher", "teacher", "--setting", "setting.yaml", "--output", "out"]
    command += ["--seeds", "[0,1]", "--scored_tokens", "150", "--max_new_tokens", "6", "--warm_epochs", "1"]
    command += ["--decoding.max_new_tokens", "6", "--decoding.seeds", "[10]"]
    command += ["--methods", "[off_policy_akl,off_policy_akl_alone_longer,on_1_one_token]"]
    for _ in range(2):  # the second finds everything done
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=240, env={**os.environ})
        assert done.returncode == 0, done.stderr[-3000:]
        assert "on-policy, share 1, one-token log-ratio | " in done.stdout and "seed by seed" in done.stdout
    rows = list(csv.DictReader((tmp_path / "out/comparison.csv").open()))
    assert len(rows) == 8
    for row in rows:
        assert float(row["own_rkl"]) > 0 and float(row["own_entropy"]) > 1
        if row["method"] != "warm start":
            wanted = 150 * METHODS[row["method"]].tokens
            assert wanted <= float(row["scored_tokens"]) < wanted + 40  # within a batch
            assert float(row["cpu_seconds"]) > 0
