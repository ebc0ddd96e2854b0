"""The ``akl`` command: short names, settings stated once, a printed configuration that is the run."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import ModelCheckpoint, RichProgressBar
from transformers import AutoTokenizer

from akl_lightning import callbacks
from akl_lightning.cli import DistillationCLI, main
from akl_lightning.errors import UsageError
from common.runs import RunCLI
from tests.conftest import gpt2

NAMES = [name for name in callbacks.__all__ if name[0].isupper()]


@pytest.fixture
def folder(tokenizer: Any, corpus: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where the command is run: two models, of which the larger has the tokenizer."""
    monkeypatch.chdir(tmp_path)
    for name, width in (("small", 16), ("large", 24)):
        gpt2(width).save_pretrained(tmp_path / name)
    tokenizer.save_pretrained(tmp_path / "large")
    return tmp_path


def akl(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    """Its exit code."""
    monkeypatch.setattr(sys, "argv", ["akl", *arguments])
    try:
        main()
    except SystemExit as end:
        return int(end.code or 0)
    return 0


RUN = [
    "--model.student", "small", "--model.teacher", "large", "--data.source", "JsonLines", "--data.source.path",
    "pairs.jsonl", "--data.max_length", "40", "--trainer.max_steps", "2", "--trainer.accelerator", "cpu",
    "--seed_everything", "1",
]  # fmt: skip


def test_a_printed_configuration_is_the_run(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = [*RUN, "--model.optimizer", "SGD", "--model.optimizer.lr", "0.1", "--trainer.precision", "bf16-mixed"]
    settings += ["--model.criterion.divergence.mu", "0.7", "--model.lr_scheduler", "linear", "--model.packing", "true"]
    settings += ["--trainer.callbacks+=AdaptiveWeightMonitor", "--trainer.callbacks.every_n_steps", "1"]
    assert akl(monkeypatch, "fit", *settings, "--print_config") == 0
    (folder / "c.yaml").write_text(capsys.readouterr().out)
    assert akl(monkeypatch, "fit", *settings, "--trainer.default_root_dir", "flags") == 0
    assert akl(monkeypatch, "fit", "--config", "c.yaml", "--trainer.default_root_dir", "file") == 0
    ends = []
    for run in ("flags", "file"):
        (checkpoint,) = (folder / run).rglob("*.ckpt")
        ends.append(torch.load(checkpoint, weights_only=True)["state_dict"])
        (saved,) = (folder / run).rglob("config.yaml")
        config = yaml.safe_load(saved.read_text())
        assert config["model"]["criterion"]["divergence"]["init_args"]["mu"] == 0.7
        assert config["data"]["tokenizer"] == "large", "stated once, for the teacher"
    assert ends[0].keys() == ends[1].keys() and all(torch.equal(ends[0][name], ends[1][name]) for name in ends[0])


def test_without_a_logger_a_second_run_writes_its_settings_beside_the_firsts(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for rate in ("0.1", "0.2"):
        assert akl(monkeypatch, "fit", *RUN, "--model.optimizer.lr", rate, "--trainer.logger", "false") == 0
    saved = [yaml.safe_load((folder / name).read_text()) for name in ("config.yaml", "config-v1.yaml")]
    assert [config["model"]["optimizer"]["init_args"]["lr"] for config in saved] == [0.1, 0.2]


def test_settings_are_overwritten_by_whoever_asks_for_it(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for rate in ("0.1", "0.2"):
        given = ["fit", *RUN, "--model.optimizer.lr", rate, "--trainer.logger", "false"]
        monkeypatch.setattr(sys, "argv", ["own.py", *given])
        DistillationCLI(save_config_kwargs={"overwrite": True})
    (saved,) = folder.glob("config*.yaml")
    assert yaml.safe_load(saved.read_text())["model"]["optimizer"]["init_args"]["lr"] == 0.2


def test_a_run_that_goes_on_has_the_rate_of_the_flag(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    schedule = ["--model.lr_scheduler", "linear", "--trainer.default_root_dir"]
    assert akl(monkeypatch, "fit", *RUN, *schedule, "one", "--model.optimizer.lr", "1e-3") == 0
    more = ["--trainer.max_steps", "8", "--ckpt_path", next((folder / "one").rglob("*.ckpt")).as_posix()]
    assert akl(monkeypatch, "fit", *RUN, *schedule, "two", "--model.optimizer.lr", "1e-5", *more) == 0
    checkpoint = torch.load(next((folder / "two").rglob("*.ckpt")), weights_only=True)
    assert checkpoint["global_step"] == 8 and checkpoint["lr_schedulers"][0]["base_lrs"] == [1e-5]
    assert checkpoint["settings"]["optimizers"][0]["groups"][0]["initial_lr"] == 1e-5


@pytest.mark.parametrize(
    ("models", "expected"),
    [
        ({"teacher": "large", "student": "{layers_of: large, keep: [0]}"}, 0),
        ({"teacher": "cache:none", "student": "{layers_of: large, keep: [0]}"}, "there is no teacher's cache in none"),
        ({"teacher": "cache:none", "student": "{model_type: gpt2}"}, "no model here has a name to take the tokenizer"),
    ],
)
def test_the_tokenizer_is_that_of_the_first_model_with_a_name(
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    models: dict[str, str],
    expected: int | str,
) -> None:
    monkeypatch.setattr("akl_lightning.cli.look_for_teacher", lambda *_: None)  # which would find no cache first
    named = [part for role, model in models.items() for part in (f"--model.{role}", model)]
    code = akl(monkeypatch, "fit", *RUN, *named, "--trainer.fast_dev_run", "true")
    assert code == (0 if expected == 0 else 2)
    if code:
        assert str(expected) in capsys.readouterr().err


def test_a_new_student_has_the_vocabulary_of_the_tokenizer(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    new = "{model_type: gpt2, n_embd: 16, n_head: 2, n_layer: 1, n_positions: 64, bos_token_id: 7}"
    assert akl(monkeypatch, "fit", *RUN, "--model.student", new, "--trainer.default_root_dir", "run") == 0
    (saved,) = (folder / "run").rglob("config.yaml")
    student = yaml.safe_load(saved.read_text())["model"]["student"]
    tokenizer = AutoTokenizer.from_pretrained(folder / "large")
    assert student["vocab_size"] == len(tokenizer) and student["eos_token_id"] == tokenizer.eos_token_id
    assert student["bos_token_id"] == 7, "what is given stays"


def test_the_writers_take_the_tokenizer_of_their_model(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = ["--data.source", "JsonLines", "--data.source.path", "pairs.jsonl", "--data.max_length", "40"]
    data += ["--trainer.accelerator", "cpu"]
    assert akl(monkeypatch, "cache", "--model.teacher", "large", "--model.path", "cache", *data) == 0
    answers = ["--model.path", "answers.jsonl", "--model.decoding.max_new_tokens", "4"]
    assert akl(monkeypatch, "generate", "--model.model", "large", *answers, *data) == 0
    assert json.loads((folder / "answers.jsonl").read_text().splitlines()[0])["prompt"]


class Bar(RichProgressBar):
    """A progress bar of a user's own."""


class Broken(Callback):
    """A user's class with a bug."""

    def __init__(self, scale: float = 1.0) -> None:
        self.scale = {}["scale"]


@pytest.mark.parametrize(
    ("arguments", "shown"),
    [
        ([], True),
        (["--trainer.enable_progress_bar", "false", "--trainer.enable_model_summary", "false"], False),
        (["--trainer.callbacks+=RichProgressBar", "--trainer.callbacks+=RichModelSummary"], False),
        (["--trainer.callbacks+=tests.test_command_line.Bar", "--trainer.enable_model_summary", "false"], False),
        (["--trainer.barebones", "true"], False),
    ],
)
def test_a_run_shows_progress_and_models_unless_told_otherwise(
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
    arguments: list[str],
    shown: bool,
) -> None:
    assert akl(monkeypatch, "fit", *RUN, *arguments) == 0
    output, errors = capfd.readouterr()
    assert ("compression ratio" in output) == shown == ("per response token" in output)
    assert ("head weight: 0." in output) == shown, "the progress bar"
    assert "Tip:" not in errors and "already configured" not in errors


def test_help_can_be_read(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert akl(monkeypatch, "fit", "--help") == 0
    output = capsys.readouterr().out
    assert "what is trained: a hub name, a local folder" in output and "divergences.AdaptiveKL" in output
    assert "torch.nn.Bilinear" not in output and len(output.splitlines()) < 760


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["--trainer.prcision", "32"],
            "unrecognized arguments: --trainer.prcision; did you mean --trainer.precision?",
        ),
        (["--trainer.max_epochs", "three"], "trainer.max_epochs: expected int or null, got 'three'."),
        (
            ["--trainer.precision", "bf17"],
            "16-mixed, bf16-true, bf16-mixed, 32-true, 64-true or 64, 32, 16, bf16 or null, got",
        ),
        (["--trainer.strategy", "fsdp3"], "You selected an invalid strategy name: `strategy='fsdp3'`"),
        (["--trainer.devices", "0"], "`Trainer(devices='0')` value is not a valid input using cpu accelerator."),
        (["--trainer.callbacks+=StudentExprt"], "trainer.callbacks: there is no StudentExprt; check its name, or give"),
        (
            ["--trainer.callbacks+=StudentExport", "--trainer.callbacks.dirpth", "x"],
            "trainer.callbacks: StudentExport has no option dirpth; --trainer.callbacks.help StudentExport lists those",
        ),
        (
            ["--trainer.callbacks+=StudentExport", "--trainer.callbacks.merge", "7"],
            "trainer.callbacks.merge: expected bool, got '7'.",
        ),
        (["--model.criterion.divergence", "KLDiv"], "divergence: there is no KLDiv; use one of A"),
        (["--model.criterion.divergence.mu", "x"], "model.criterion.divergence.mu: expected float, got 'x'."),
        (
            ["--model.optimizer", "AdamW", "--model.optimizer.lrr", "1"],
            "model.optimizer: AdamW has no option lrr; --mod",
        ),
        (["--model.optimizer.lr", "-1"], "model.optimizer does not accept an argument: Invalid learning rate: -1.0"),
        (["--model.optimizer.lr", "x"], "model.optimizer.lr: expected float or the name of a class, got 'x'."),
        (["--model.criterion.divergence", "mine.Own"], "mine.Own: No module named 'mine'; PYTHONPATH=. lets one of"),
        (["--model.criterion.divergence", "json.Own"], "json.Own: module 'json' has no attribute 'Own'"),
        (["--trainer.callbacks+=EarlyStopping"], "EarlyStopping: the following arguments are required: monitor"),
        (["--trainer.logger", "TensorBordLogger"], "trainer.logger: there is no TensorBordLogger; check its name, or"),
        (
            ["--trainer.callbacks+=LastCheckpoint", "--trainer.callbacks.every_n_steps", "0"],
            "every_n_steps must be 1 or more, got 0.",
        ),
        (["--model.lr_scheduler", "cosin"], "expected constant, constant_with_warmup, linear, cosine or the name of a"),
        (
            ["--model.lr_scheduler", "StepLR"],
            "torch.optim.lr_scheduler.StepLR: the following arguments are required: st",
        ),
        (
            ["--trainer.strategy", "FSDP2Strategy", "--trainer.strategy.foo", "1"],
            "trainer.strategy: FSDP2Strategy has no option foo; --trainer.strategy.help FSDP2Strategy lists",
        ),
        (["--model.criterion", "{alpha: x}"], "model.criterion.alpha: expected float, got 'x'."),
        (["--model.lora.rank", "x"], "model.lora.rank: expected int, got 'x'."),
        (["--config", "none.yaml"], "File does not exist: "),
        (["--config", "broken.yaml"], "broken.yaml is no YAML: while parsing a flow"),
        (["--config=broken.yaml"], "broken.yaml is no YAML: while parsing a flow"),
        (["--config", "date.yaml"], "data.validation_size: expected int or float, got '2020-99-99'."),
        (["--config", "binary.yaml"], "binary.yaml is no YAML: 'utf-8' codec can't decode byte 0xff"),
        (["--data.source.path", "binary.yaml"], "binary.yaml, line 1 is no JSON in UTF-8 but UTF-16 or UTF-32"),
        (["--trainer.logger", "CometLogger"], "CometLogger: Requirement 'comet-ml"),
    ],
)
def test_a_mistake_is_one_sentence(
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    message: str,
) -> None:
    (folder / "broken.yaml").write_text("model: [")
    (folder / "date.yaml").write_text("data: {validation_size: 2020-99-99}")
    (folder / "binary.yaml").write_bytes(b"\xff\x00\xfe")
    assert akl(monkeypatch, "fit", *RUN, *arguments) == 2
    said = capsys.readouterr().err.split("error: ")[1].removesuffix("(--help lists the options)\n").strip()
    assert message in said and "\n" not in said
    assert not list(folder.rglob("*.ckpt"))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["--trainer.callbacks+=StudentExport", "--trainer.callbacks.dirpath", "large"],
            "large is not empty and is nev",
        ),
        (
            ["--trainer.callbacks+=StudentExport", "--trainer.callbacks.dirpath", "pairs.jsonl/x"],
            "cannot write to pairs",
        ),
        (["--trainer.callbacks+=StudentExport", "--trainer.callbacks.tokenizer", "small"], "cannot load the tokenizer"),
        (
            ["--trainer.callbacks+=LastCheckpoint", "--trainer.callbacks.dirpath", "old"],
            "last.ckpt is another run's an",
        ),
        (
            ["--trainer.callbacks+=HeadTailPlot", "--trainer.callbacks.dirpath", "pairs.jsonl/x"],
            "cannot write to pairs",
        ),
        (["--ckpt_path", "gone.ckpt"], "the checkpoint gone.ckpt is no file"),
        (["--ckpt_path", "old/last.ckpt"], "the checkpoint old/last.ckpt is damaged"),
        (["--data.source.path", "gone.jsonl"], "there is no file gone.jsonl"),
        (["--data.max_length", "3"], "no usable train sample left"),
        (["--data.validation_size", "-1"], "data.validation_size must be a number of samples or a share"),
        (
            ["--model.lr_scheduler", "OneCycleLR", "--model.lr_scheduler.max_lr", "1"],
            "model.lr_scheduler does not accept",
        ),
        (
            ["--model.lr_scheduler", "cosine", "--trainer.max_steps", "-1", "--trainer.max_epochs", "-1"],
            "which has no end",
        ),
        (
            ["--model.lr_scheduler", "cosine", "--trainer.max_steps", "-1", "--trainer.max_time", "00:00:01:00"],
            "which has no end",
        ),
        (["--model.optimizer.lr", "-1"], "Invalid learning rate"),
    ],
)
def test_what_costs_little_is_looked_at_before_a_model_is_loaded(
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    message: str,
) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("a model is loaded")

    (folder / "old").mkdir()
    (folder / "old/last.ckpt").write_text("of another run")
    for name in ("module.load_causal_lm", "teachers.choose.LiveTeacher"):
        monkeypatch.setattr(f"akl_lightning.{name}", refuse)
    assert akl(monkeypatch, "fit", *RUN, *arguments) == 2
    assert message in capsys.readouterr().err.split("error: ")[1]


CACHED = ["--model.teacher", "cache:cached"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([*CACHED, "--model.on_policy.share", "0.5"], "a cached teacher cannot score rollouts, which it has not seen"),
        (CACHED, "there is no teacher's cache in cached: give the folder that akl cache has written"),
        (["--model.student", "gone"], "cannot load the student 'gone': it is no local folder with a model in it"),
        (["--model.teacher", "gone"], "cannot load the teacher 'gone': it is no local folder with a model in it"),
        (["--model.student", "empty"], "cannot load the student 'empty': Unrecognized model in empty"),
        (["--model.teacher", "bare"], "cannot load the teacher 'bare': there are no weights in it, model.safetensors"),
        (
            ["--model.student", "adapter"],
            "cannot load the base of the student 'adapter', 'gone': it is no lo",
        ),
        (["--model.student", "{layers_of: gone, keep: [0]}"], "cannot load the student 'gone': it is no local folder"),
        (["--model.student", "{model_type: gpt9}"], "transformers knows no model_type 'gpt9'"),
        (["--model.teacher", "large/no.gguf"], "cannot load the teacher 'large/no.gguf': there is no such file"),
        (["--model.teacher", "package:no_such"], "the package of 'package:no_such' is not installed"),
    ],
)
def test_what_is_wrong_with_models_is_said_before_the_data_are_read(
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    message: str,
) -> None:
    def refuse(*_: Any) -> None:
        raise AssertionError("the data are read")

    for name in ("empty", "adapter"):
        (folder / name).mkdir()
    (folder / "adapter/adapter_config.json").write_text(json.dumps({"base_model_name_or_path": "gone"}))
    gpt2(16).config.save_pretrained(folder / "bare")
    monkeypatch.setattr("akl_lightning.data.samples.InstructionData.encode", refuse)
    assert akl(monkeypatch, "fit", *RUN, "--data.tokenizer", "large", *arguments) == 2
    assert message in capsys.readouterr().err.split("error: ")[1]


def test_a_callback_given_twice_is_one_sentence(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    twice = ["--trainer.callbacks+=StudentExport", "--trainer.callbacks.dirpath", "one"]
    twice += ["--trainer.callbacks+=StudentExport", "--trainer.callbacks.dirpath", "two"]
    assert akl(monkeypatch, "fit", *RUN, *twice) == 2
    assert "trainer.callbacks has StudentExport twice: give it once." in capsys.readouterr().err


def test_a_callback_stands_in_for_the_recipes_own(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (folder / "own.yaml").write_text("seed_everything: 0")
    monkeypatch.setattr(sys, "argv", ["own.py"])

    def run(*arguments: str) -> list[Callback]:
        return RunCLI(folder / "own.yaml", None, [*RUN, *arguments]).trainer.callbacks

    given = ["--trainer.callbacks+=StudentExport", "--trainer.callbacks.dirpath", "mine"]
    callbacks_ = run(*given, "--trainer.callbacks+=LastCheckpoint", "--trainer.callbacks.every_n_steps", "7")
    (export,) = [callback for callback in callbacks_ if isinstance(callback, callbacks.StudentExport)]
    (last,) = [callback for callback in callbacks_ if isinstance(callback, callbacks.LastCheckpoint)]
    assert export.dirpath == "mine"
    assert last.every_n_steps == 7 and last.path == Path("runs/own/checkpoints/last.ckpt")
    assert (
        last.command == "python own.py" and len([each for each in callbacks_ if isinstance(each, ModelCheckpoint)]) == 2
    )
    with pytest.raises(UsageError, match="cannot load the student"):
        run("--model.student", "nowhere", "--model.teacher", "large")
    assert [path.name for path in (folder / "runs").iterdir()] == ["own"], "no empty folder is left"


def test_a_bug_in_a_class_of_the_users_own_is_not_hidden(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError) as caught:
        akl(monkeypatch, "fit", *RUN, "--trainer.callbacks+=tests.test_command_line.Broken")
    assert isinstance(caught.value.__cause__, KeyError)


def test_help_knows_all_commands(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert akl(monkeypatch, "--help") == 0
    assert "{fit,validate,test,predict,cache,generate,judge,show,tokenizers}" in capsys.readouterr().out
    assert akl(monkeypatch, "fti") == 2
    assert "invalid choice: 'fti' (choose from" in capsys.readouterr().err


def test_a_command_that_is_no_training_comes_first(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (folder / "c.yaml").write_text("{}")
    arguments = ["--data.source", "JsonLines", "--data.source.path", "pairs.jsonl", "--model.path", "cache"]
    assert akl(monkeypatch, "--config", "c.yaml", "cache", "--model.teacher", "large", *arguments) == 2
    assert "the command comes first: akl cache, then its options." in capsys.readouterr().err
    assert not (folder / "cache").exists()


def test_a_shell_completes(folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert akl(monkeypatch, "--print_completion", "shtab-bash") == 0
    (folder / "akl.bash").write_text(capsys.readouterr().out)

    def completed(*words: str) -> list[str]:
        script = (
            'source ./akl.bash; COMP_WORDS=("$@"); COMP_CWORD=$((${#COMP_WORDS[@]} - 1)); COMP_TYPE=9; '
            '_shtab_akl; printf "%s\\n" "${COMPREPLY[@]}"'
        )
        result = subprocess.run(
            ["bash", "-c", script, "bash", "akl", *words], cwd=folder, capture_output=True, text=True, timeout=30
        )
        return result.stdout.split()

    assert completed("ca") == ["cache"]
    assert completed("fit", "--model.criterion.t") == ["--model.criterion.temperature"]
    assert "--model.criterion.divergence.mu" in completed("fit", "--model.criterion.divergence.")
    assert "akl_lightning.divergences.SkewKL" in completed("fit", "--model.criterion.divergence", "akl")
    assert completed("fit", "--trainer.precision", "bf16-m") == ["bf16-mixed"]
    assert completed("fit", "--model.student", "lar") == ["large"], "a folder"
    assert "--model.codec" in completed("cache", "--model.c")


def test_every_callback_has_a_short_name(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    chosen = [f"--trainer.callbacks+={name}" for name in NAMES]
    required = ["--model.student", "models/small", "--data.tokenizer", "models/small"]
    assert akl(monkeypatch, "fit", *required, *chosen, "--print_config") == 0
    output = capsys.readouterr().out
    assert all(f"class_path: akl_lightning.callbacks.{name}\n" in output for name in NAMES)


def test_they_run_from_the_command_line(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    chosen = [f"--trainer.callbacks+={name}" for name in NAMES]
    settings = ["--model.max_new_tokens", "4", "--trainer.max_steps", "-1", "--trainer.max_epochs", "1"]
    settings += ["--trainer.logger", "CSVLogger", "--trainer.logger.save_dir", "logs"]
    assert akl(monkeypatch, "fit", *RUN, *settings, *chosen) == 0
    assert (folder / "head_tail_error.png").is_file() and (folder / "student/README.md").is_file()
    (answers,) = (folder / "logs").rglob("answers.jsonl")
    assert {path.name for path in answers.parent.iterdir()} >= {"distributions", "head_weight_map", "head_tail_error"}


@pytest.mark.parametrize(
    ("given", "ends"),
    [
        ([], (3, -1, None)),
        (["--trainer.max_steps", "1"], (None, 1, None)),
        (["--trainer.max_epochs", "1"], (1, -1, None)),
        (["--trainer.max_time", "00:00:00:01"], (None, -1, "00:00:00:01")),
    ],
)
def test_a_run_that_is_given_no_end_has_three_epochs(
    given: list[str], ends: tuple[Any, ...], folder: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    said: list[str] = []
    monkeypatch.setattr("akl_lightning.optimization.rank_zero_info", said.append)
    few = ["--trainer.limit_train_batches", "1", "--trainer.limit_val_batches", "0"]
    at = RUN.index("--trainer.max_steps")
    assert akl(monkeypatch, "fit", *RUN[:at], *RUN[at + 2 :], *few, *given) == 0
    (saved,) = tmp_path.rglob("config.yaml")
    trainer = yaml.safe_load(saved.read_text())["trainer"]
    assert (trainer["max_epochs"], trainer["max_steps"], trainer["max_time"]) == ends
    (checkpoint,) = tmp_path.rglob("*.ckpt")
    if ends[2] is None:
        assert torch.load(checkpoint, weights_only=True)["global_step"] == max(ends[:2], key=lambda end: end or 0)
    expected = "3 epochs, as no end is given: trainer.max_epochs, max_steps or max_time sets another."
    assert [line for line in said if "epochs" in line] == [expected] * (ends[0] == 3)
