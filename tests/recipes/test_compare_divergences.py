"""The comparison as a user runs it: killed, started twice at once, refused with other settings; its arithmetic."""

import csv
import json
import os
import re
import signal
import subprocess
import time
from pathlib import Path

import pytest
import yaml
from transformers import PreTrainedTokenizerFast

from akl_lightning.data.records import content_digest
from akl_lightning.data.sources import Files
from common.comparison import difference, spread
from recipes.compare_divergences import BASELINES, draw, line_of, write_lines
from tests.commands.start import python
from tests.conftest import PAIRS, gpt2

RECIPE = Path(__file__).parents[2] / "recipes/compare_divergences.py"
SETTING = {
    "model": {
        "student": {"model_type": "gpt2", "n_layer": 1, "n_embd": 16, "n_head": 2, "n_positions": 64,
                    "bos_token_id": 0, "eos_token_id": 0},
        "optimizer": {"class_path": "torch.optim.AdamW", "init_args": {"lr": 0.01}},
    },
    "data": {"batch_size": 4, "max_length": 40, "max_prompt_length": 30, "validation_size": 4, "test_size": 4},
    "trainer": {"max_epochs": 2, "val_check_interval": 0.5, "accelerator": "cpu"},
}  # fmt: skip


@pytest.fixture
def folder(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> Path:
    gpt2(24, len(tokenizer)).save_pretrained(tmp_path / "teacher")
    tokenizer.save_pretrained(tmp_path / "teacher")
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(pair) + "\n" for pair in PAIRS))
    setting = json.loads(json.dumps(SETTING))
    setting["model"]["student"]["vocab_size"] = len(tokenizer)
    setting["data"]["source"] = {"class_path": "JsonLines", "init_args": {"path": str(tmp_path / "pairs.jsonl")}}
    (tmp_path / "setting.yaml").write_text(yaml.safe_dump(setting))
    return tmp_path


def start(folder: Path, *arguments: str) -> subprocess.Popen[str]:
    command = [python(), str(RECIPE), "--setting", "setting.yaml", "--teacher", "teacher", "--output", "out"]
    command += ["--decoding.max_new_tokens", "6", "--decoding.seeds", "[10,20]", "--train_size", "20", *arguments]
    return subprocess.Popen(
        command, cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env={**os.environ}
    )


def finish(process: subprocess.Popen[str], code: int = 0) -> str:
    try:
        output, _ = process.communicate(timeout=240)
    finally:
        process.kill()
    assert process.returncode == code, output[-3000:]
    return output


def test_killed_then_two_at_once_and_a_report(folder: Path) -> None:
    arguments = ["--baselines", "[akl,rkl,seqkd]", "--seeds", "[0,1]"]
    process = start(folder, *arguments)
    deadline = time.monotonic() + 200
    while not (folder / "out/akl/seed0/checkpoints/last.ckpt").exists():
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.05)
    process.send_signal(signal.SIGKILL)
    process.communicate()  # until all that has its output is gone
    outputs = [finish(one) for one in [start(folder, *arguments) for _ in range(2)]]
    assert all("| SeqKD |" in output for output in outputs)

    runs = [folder / f"out/{name}/seed{seed}" for name in ("akl", "rkl", "seqkd") for seed in (0, 1)]
    results = [json.loads((run / "result.json").read_text()) for run in runs]
    for result in results:
        assert [point["epoch"] for point in result["curve"]] == pytest.approx([0, 0.4, 0.8, 1.4, 1.8])
    assert not any((run / "checkpoints").exists() for run in runs)
    # The same start for every baseline of a seed.
    assert results[0]["curve"][0]["val/fkl"] == results[2]["curve"][0]["val/fkl"] != results[1]["curve"][0]["val/fkl"]
    rows = list(csv.DictReader((folder / "out/comparison.csv").open()))
    assert [row["baseline"] for row in rows] == ["akl", "rkl", "seqkd"] * 2 + ["teacher"]
    assert float(rows[0]["rkl"]) == results[0]["figures"]["rkl"]
    assert float(rows[-1]["fkl"]) < 1e-3, "the teacher is its own student"
    report = (folder / "out/comparison.md").read_text()
    mean = (results[2]["figures"]["fkl"] + results[3]["figures"]["fkl"]) / 2
    assert re.search(rf"\| RKL \| [^|]+ \| {mean:.3f} ± ", report)
    assert (folder / "out/comparison.png").read_bytes().startswith(b"\x89PNG")
    # SeqKD has learnt what the teacher says, not the references.
    answers = {json.loads(line)["output"] for line in (folder / "out/data/seqkd.jsonl").read_text().splitlines()}
    assert not answers & {pair["output"] for pair in PAIRS}

    assert "holds runs with another train_size" in finish(start(folder, *arguments, "--train_size", "10"), code=2)
    assert "there is no baseline 'x': use some of akl, " in finish(start(folder, "--baselines", "[x]"), code=2)


def test_what_is_written_down_is_read_as_it_was(tmp_path: Path) -> None:
    call = {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "f", "arguments": {}}}]}
    records = [
        {"instruction": "a", "input": 0, "output": ["b", "c"]},
        {"messages": [{"role": "user", "content": "a"}, call, {"role": "tool", "content": "1"},
                      {"role": "assistant", "content": "b", "learn": False}], "tools": [{"name": "f"}], "cut": True},
        {"text": "A document."},
        {"prompt": "a"},
    ]  # fmt: skip
    write_lines(tmp_path / "one.jsonl", records)
    one = Files(test_path=str(tmp_path / "one.jsonl")).load()["test"]
    write_lines(tmp_path / "two.jsonl", map(line_of, one))
    two = Files(test_path=str(tmp_path / "two.jsonl")).load()["test"]
    assert len(two) == 4 and content_digest(one) == content_digest(two) and one["key"] == two["key"]


def test_differences_by_hand() -> None:
    # Differences 1, 2, 3: mean 2, standard deviation 1, and Student's t with two degrees of freedom is 4.303.
    assert difference([2.0, 3.0, 4.0], [1.0, 1.0, 1.0]) == "+2.000 (-0.484 to +4.484)"
    assert difference([2.0, 2.1, 1.9], [1.0, 1.0, 1.0]) == "**+1.000 (+0.752 to +1.248)**"


def test_a_seed_whose_answers_have_no_figure_is_left_out_and_counted() -> None:
    none = float("nan")
    assert spread([1.0, none, 3.0]) == "2.000 ± 1.414 (2 of 3 seeds)"
    assert spread([none, 1.0]) == "1.000 (1 of 2 seeds)" and spread([none]) == "none" and spread([1.0]) == "1.000"
    assert difference([2.0, none, 3.0, 4.0], [1.0, 1.0, 1.0, 1.0]) == "+2.000 (-0.484 to +4.484)"
    assert difference([none, 1.0], [1.0, 1.0]) == "none"


def test_the_figure() -> None:
    curve = [
        {"epoch": float(epoch), "val/head_error": 1.0 / (1 + epoch), "val/tail_error": 2.0 / (1 + epoch)}
        for epoch in range(4)
    ]
    figure = draw({name: [curve, curve] for name in BASELINES})
    head, tail, share = figure.axes
    assert len(head.lines) == len(tail.lines) == len(BASELINES) and len(share.lines) == 4
    assert share.lines[0].get_ydata() == pytest.approx([1 / 3] * 3)
    assert {line.get_label() for line in head.lines} >= {"AKL", "FKL", "SeqKD"}
