import sys
from pathlib import Path

import pytest

from akl_lightning import callbacks
from akl_lightning.cli import main
from tests.conftest import gpt2

NAMES = [name for name in callbacks.__all__ if name[0].isupper()]


def test_every_callback_has_a_short_name(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    chosen = [f"--trainer.callbacks+={name}" for name in NAMES]
    required = ["--model.student", "models/small", "--data.tokenizer", "models/small"]
    monkeypatch.setattr(sys, "argv", ["akl", "fit", *required, *chosen, "--print_config"])
    with pytest.raises(SystemExit) as end:
        main()
    assert end.value.code == 0
    output = capsys.readouterr().out
    assert all(f"class_path: akl_lightning.callbacks.{name}\n" in output for name in NAMES)


def test_they_run_from_the_command_line(
    tokenizer_folder: str, corpus: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for name, width in (("small", 16), ("large", 24)):
        gpt2(width).save_pretrained(tmp_path / name)
    arguments = {
        "--model.student": "small", "--model.teacher": "large", "--model.max_new_tokens": "4",
        "--data.tokenizer": tokenizer_folder, "--data.source": "JsonLines", "--data.source.path": corpus,
        "--data.max_length": "40", "--trainer.max_epochs": "1", "--trainer.accelerator": "cpu",
        "--trainer.logger": "CSVLogger", "--trainer.logger.save_dir": "logs",
    }  # fmt: skip
    chosen = [f"--trainer.callbacks+={name}" for name in NAMES]
    monkeypatch.setattr(sys, "argv", ["akl", "fit", *(part for pair in arguments.items() for part in pair), *chosen])
    main()
    assert (tmp_path / "head_tail_error.png").is_file() and (tmp_path / "student/README.md").is_file()
    (answers,) = (tmp_path / "logs").rglob("answers.jsonl")
    assert {path.name for path in answers.parent.iterdir()} >= {"distributions", "head_weight_map", "head_tail_error"}
