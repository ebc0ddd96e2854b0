"""The recipe as a user runs it: a process of its own, in a folder of its own, on a cut-down budget."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from transformers import AutoModelForCausalLM, AutoTokenizer

from akl_lightning.evaluation.answers import read_answers
from tests.commands.start import python
from tests.end_to_end import terminal

RECIPES = Path(__file__).parents[2] / "recipes"
SMALL = {
    "--teacher.model.n_layer": "1",
    "--teacher.model.n_embd": "48",
    "--teacher.max_epochs": "4",
    "--data.validation_size": "0.45",
    "--data.test_size": "0.45",
    "--model.student.n_layer": "1",
    "--model.student.n_embd": "32",
    "--model.max_new_tokens": "8",
    "--trainer.max_epochs": "2",
    "--trainer.limit_val_batches": "4",
    "--trainer.limit_test_batches": "4",
    "--teacher.cache_dir": "cache",
}


def start(folder: Path, *arguments: str, **changed: str) -> subprocess.Popen[str]:
    settings = [part for name, value in {**SMALL, **changed}.items() for part in (name, value)]
    command = [python(), str(RECIPES / "gpt2_distill.py"), *settings, *arguments]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "COLUMNS": "120"}
    return subprocess.Popen(
        command, cwd=folder, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


def run(folder: Path, *arguments: str, **changed: str) -> str:
    process = start(folder, *arguments, **changed)
    try:
        output, _ = process.communicate(timeout=240)
    finally:
        process.kill()
    assert process.returncode == 0, output[-4000:]
    return output


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("recipe")


@pytest.fixture(scope="module")
def screen(folder: Path) -> terminal.Screen:
    """What the first command, cut down, leaves on a terminal of 80 columns."""
    settings = [part for name, value in SMALL.items() for part in (name, value)]
    command = [sys.executable, str(RECIPES / "gpt2_distill.py"), *settings]
    code, screen = terminal.run(command, folder, {**os.environ, "HF_HUB_OFFLINE": "1"})
    assert code == 0, "\n".join(screen.rows()[-60:])
    return screen


@pytest.fixture(scope="module")
def first(screen: terminal.Screen) -> str:
    return "\n".join(screen.lines())


def test_the_screen_of_the_first_run_can_be_read(screen: terminal.Screen) -> None:
    rows = screen.rows()
    shown = "\n".join(rows)
    assert not re.search(r"\[/?(bold|b|i|red|green|blue|dim|cyan|magenta|#\w+)\b[^]]*\]", shown), "markup"
    assert "/-2" not in shown and "\x1b" not in shown and "�" not in shown and "Traceback" not in shown
    # Whatever is drawn again is drawn in its place, and no message cuts a bar in two.
    left = {"Testing ": 3, "Validation ": 0, "Sanity Checking": 0, "Digest ": 0}
    assert {bar: sum(row.startswith(bar) for row in rows) for bar in left} == left
    # One of each training stays; on a busy machine one more may, which Rich has drawn at its end.
    assert 2 <= sum(row.startswith("Epoch ") for row in rows) <= 3
    assert any(row.startswith("Trained 2 epochs") for row in rows)
    (heading,) = [number for number, row in enumerate(rows) if row.startswith("Held-out split: nats and gaps")]
    table = rows[heading : heading + 9]
    assert all(any(row.strip().startswith(name) for row in table) for name in ("student before", "teacher"))
    assert not any("…" in row for row in table), "cut off"


def figures(run: Path) -> dict[str, dict[str, float]]:
    return json.loads((run / "report.json").read_text())["figures"]


def test_first_run_trains_distils_reports_and_exports(folder: Path, first: str) -> None:
    run = folder / "runs/gpt2_distill"
    assert "Teacher: training" in first
    assert "Global batch: 32 samples" in first

    rows = figures(run)
    assert list(rows) == ["student before", "student after", "teacher"]
    assert rows["teacher"]["cross_entropy"] < rows["student before"]["cross_entropy"] - 0.5
    assert rows["student after"]["fkl"] < 0.7 * rows["student before"]["fkl"]
    assert rows["student after"]["rkl"] < 0.7 * rows["student before"]["rkl"]
    assert rows["teacher"]["fkl"] == 0
    columns = {"cross_entropy", "perplexity", "fkl", "rkl", "head_error", "tail_error", "rouge_l"}
    assert columns <= set(rows["student after"])

    # The last lines say where everything lies, and it lies there.
    lines = dict(re.findall(r"^(.+?): +(\S.*)$", "\n".join(first.strip().splitlines()[-7:]), re.M))
    assert (folder / lines["Head and tail error per epoch"]).read_bytes().startswith(b"\x89PNG")
    assert (folder / lines["Figures"]).is_file()
    kept = [read_answers(path) for path in sorted((folder / lines["All answers"]).glob("*.jsonl"))]
    assert [len(records) for records in kept] == [128] * 3 and kept[0][0]["references"]
    assert (folder / lines["Checkpoints"] / "last.ckpt").is_file()
    assert (folder / lines["The best by validation"] / "model.safetensors").is_file()
    logs = folder / lines["TensorBoard"].removeprefix("tensorboard --logdir ")
    events = EventAccumulator(str(logs)).Reload()
    assert set(events.Tags()["images"]) == {"head_tail_error", "head_weight_map", "distributions"}
    assert "compression ratio" in first and "Trained 2 epochs" in first
    assert {"train/head_error", "val/tail_error", "train/head_weight_step"} <= set(events.Tags()["scalars"])

    student = AutoModelForCausalLM.from_pretrained(folder / lines["Student, for from_pretrained"])
    tokenizer = AutoTokenizer.from_pretrained(folder / lines["Student, for from_pretrained"])
    batch = tokenizer("def json.dumps(obj)\n", return_tensors="pt")
    checkpoint = torch.load(run / "checkpoints/last.ckpt", weights_only=True)
    assert not any("teacher" in name for name in checkpoint["state_dict"])
    trained = {
        name.removeprefix("student.model."): value
        for name, value in checkpoint["state_dict"].items()
        if name.startswith("student.model.")
    }
    twin = AutoModelForCausalLM.from_config(student.config)
    twin.load_state_dict(trained)
    assert torch.equal(twin.eval()(**batch).logits, student(**batch).logits)


def test_later_runs_find_the_teacher_on_several_devices_too(folder: Path, first: str) -> None:
    half = {"--trainer.limit_test_batches": "2"}
    output = run(folder, "--model.criterion.divergence.init_args.mu", "0.6", **{"--trainer.devices": "2", **half})
    assert output.count("Tokenizer and teacher: found in") == 2  # each process looks, none builds
    assert "Teacher: training" not in output
    assert "Global batch: 64 samples = 32 per device × 2 devices" in output
    assert output.count("Student, for from_pretrained:") == 1
    rows, alone = figures(folder / "runs/gpt2_distill-v1"), figures(folder / "runs/gpt2_distill")
    assert rows["student after"]["fkl"] < rows["student before"]["fkl"]
    # Half the batches on each of two devices are the same samples, and these two models are the same.
    for model in ("student before", "teacher"):
        for figure in ("cross_entropy", "fkl", "rkl", "rouge_l"):
            assert rows[model][figure] == pytest.approx(alone[model][figure], rel=1e-4, abs=1e-5)


def test_a_run_goes_on_from_its_checkpoint(folder: Path, first: str) -> None:
    rate = {"--model.optimizer.init_args.lr": "1e-5"}
    given = ("--ckpt_path", "runs/gpt2_distill/checkpoints/last.ckpt")
    output = run(folder, *given, **{"--trainer.max_epochs": "3", **rate})
    assert "Restored all states from the checkpoint" in output
    checkpoint = torch.load(folder / "runs/gpt2_distill/checkpoints/last.ckpt", weights_only=True)
    assert checkpoint["epoch"] == 2
    assert checkpoint["lr_schedulers"][0]["base_lrs"] == [1e-5], "what is asked for now"
    assert "student-v1" in output  # the export of the shorter run is left alone


def test_trainer_flags_and_divergences_by_name(folder: Path, first: str) -> None:
    output = run(
        folder,
        *("--model.criterion.divergence", "ReverseKL"),
        **{"--trainer.precision": "bf16-mixed", "--trainer.max_epochs": "1", "--trainer.limit_train_batches": "3"},
    )
    assert "bfloat16 Automatic Mixed Precision" in output
    (config,) = (folder / output.rsplit("Checkpoints: ", 1)[1].split()[0]).parent.rglob("config.yaml")
    assert "akl_lightning.divergences.ReverseKL" in config.read_text()


def test_killed_half_way_it_leaves_no_teacher_behind(tmp_path: Path) -> None:
    process = start(tmp_path, **{"--teacher.max_epochs": "50"})
    try:
        deadline = time.monotonic() + 120
        unfinished = []
        while not unfinished and time.monotonic() < deadline:
            time.sleep(0.2)
            unfinished = list((tmp_path / "cache").glob(".teacher-*"))
        assert unfinished, "the teacher's training never began"
        process.send_signal(signal.SIGKILL)
        process.communicate(timeout=30)  # until all that has its output is gone
    finally:
        process.kill()
        process.wait()
    assert not list((tmp_path / "cache").glob("teacher-*/"))


def test_help_lists_every_section() -> None:
    command = [python(), str(RECIPES / "gpt2_distill.py"), "--help"]
    output = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    for option in ("--trainer.precision", "--model.criterion.alpha", "--data.batch_size", "--teacher.max_epochs"):
        assert option in output
    assert "--ckpt_path" in output


def test_hub_out_of_reach(tmp_path: Path) -> None:
    command = [python(), str(RECIPES / "gpt2_distill.py"), "--config", str(RECIPES / "gpt2_dolly.yaml")]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    result = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120)
    assert result.returncode == 2
    (error,) = [line for line in result.stderr.splitlines() if line.startswith("error:")]
    assert "openai-community/gpt2" in error or "MiniLLM" in error
    assert "give the path of a local folder" in error
    assert "Traceback" not in result.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--model.criterion.divergence", "KLDiv"], "use one of AdaptiveKL, ForwardKL, JensenShannon"),
        (["--model.criterion.divergence.init_args.mu", "1.5"], "mu must lie in (0, 1], got 1.5"),
        (["--data.max_length", "300"], "data.max_length = 300 is beyond the 256 positions of the"),
        (["--model.student.vocab_size", "2000"], "the student has no output for the token"),
        (["--model.criterion.temperature", "0"], "temperature must be a positive number, got 0"),
        (["--model.teacher", "cache:somewhere"], "which a cache cannot: train with akl fit"),
        (["--ckpt_path", "last"], "there is no checkpoint to go on from in runs/gpt2_distill"),
        (["--trainer.precison", "32"], "precison"),
    ],
)
def test_mistakes_end_with_one_sentence_before_any_work(tmp_path: Path, arguments: list[str], message: str) -> None:
    command = [python(), str(RECIPES / "gpt2_distill.py"), "--teacher.cache_dir", "cache", *arguments]
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert result.returncode == 2
    assert message in result.stderr
    assert "Traceback" not in result.stderr
    assert not (tmp_path / "runs").exists()
    assert not list(tmp_path.glob("cache/teacher-*/"))
    assert "Teacher: training" not in result.stdout
