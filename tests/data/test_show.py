import io
import re
from pathlib import Path

import pytest
from lightning.pytorch import Trainer
from rich.console import Console

from akl_lightning.commands import COMMANDS
from akl_lightning.data.module import InstructionDataModule
from akl_lightning.data.preview import pieces, show
from akl_lightning.data.sources import JsonLines
from akl_lightning.errors import UsageError
from akl_lightning.module import DistillationModule
from tests.conftest import QUIET, gpt2
from tests.data.test_module import said, write


@pytest.fixture
def mixed(tmp_path: Path) -> str:
    records = [said("one", "two", "three", "four\x1b[2J"), {"text": "five six"}, {"prompt": "Say [bold]seven"}]
    return write(tmp_path / "mixed.jsonl", *records)


NONE_HELD_OUT = ["--data.validation_size", "0", "--data.test_size", "0"]


def test_samples_on_the_command_line(tokenizer_folder: str, mixed: str, capsys: pytest.CaptureFixture) -> None:
    COMMANDS["show"]([mixed, "--data.tokenizer", tokenizer_folder, *NONE_HELD_OUT])
    shown = capsys.readouterr().out
    assert all(len(line) <= 80 for line in shown.splitlines())
    assert "Template 'plain', all_turns learnt, at most 1,024 tokens; what is learnt stands between [[ and ]]" in (
        shown.replace("\n", " ").replace("  ", " ")
    )
    assert "one\n[[two]]three\n[[four\\x1b[2J<|endoftext|>]]\n" in shown.replace("two<|endoftext|>", "two")
    assert re.search(r"train 1 of 3 \(mixed\.jsonl, line 1, messages\): \d+ tokens, \d+ learnt in 2 turns\n", shown)
    assert "ive six<|endoftext|>]]" in shown
    assert "Say [bold]seven" in shown and "a prompt alone, nothing" in shown


def test_ids_and_labels(tokenizer, tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", {"instruction": "Say one", "output": "one"})
    data = InstructionDataModule(tokenizer, JsonLines(path), validation_size=0, test_size=0)
    data.setup("show")
    row = data.splits["train"][0]
    console = Console(file=io.StringIO(), width=80)
    show(data, "train", 3, tokens=True, console=console)
    lines = console.file.getvalue().splitlines()
    first = next(
        number for number, line in enumerate(lines) if line.split() == ["place", "id", "label", "turn", "token"]
    )
    table = [line.split(maxsplit=4) for line in lines[first + 1 :]]
    assert [int(cells[1]) for cells in table] == row["input_ids"]
    labels = [int(cells[2]) for cells in table]
    start, end = row["spans"]
    assert labels == [-100] * start + row["input_ids"][start:end]
    assert table[-1][3:] == ["0", "'<|endoftext|>'"]


def test_colours_on_a_terminal(tokenizer, mixed: str) -> None:
    data = InstructionDataModule(tokenizer, JsonLines(mixed), validation_size=0, test_size=0)
    data.setup("show")
    console = Console(file=io.StringIO(), width=80, force_terminal=True, color_system="standard", highlight=False)
    show(data, "train", 1, tokens=False, console=console)
    written = console.file.getvalue()
    assert "[[" not in written and "\x1b[1;32mtwo" in written and "\x1b[2J" not in written


def test_the_pieces_are_the_text(tokenizer, mixed: str) -> None:
    data = InstructionDataModule(tokenizer, JsonLines(mixed), validation_size=0, test_size=0)
    data.setup("show")
    for row in data.splits["train"]:
        found = list(pieces(row, tokenizer))
        assert "".join(text for text, _ in found).replace("\\x1b", "\x1b") == tokenizer.decode(row["input_ids"])
        assert any(learnt for _, learnt in found) == bool(row["learnt"])


def test_mistakes(tokenizer_folder: str, mixed: str, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(UsageError, match=r"there is no file .*gone\.jsonl"):
        COMMANDS["show"]([str(tmp_path / "gone.jsonl"), "--data.tokenizer", tokenizer_folder])
    with pytest.raises(UsageError, match="samples must be 1 or more, got 0"):
        COMMANDS["show"]([mixed, "--data.tokenizer", tokenizer_folder, "--samples", "0"])
    with pytest.raises(SystemExit):
        COMMANDS["show"]([mixed])
    assert "data.tokenizer" in capsys.readouterr().err
    with pytest.raises(UsageError, match="Files gives no test samples to show"):
        COMMANDS["show"]([mixed, "--data.tokenizer", tokenizer_folder, "--split", "test", *NONE_HELD_OUT])


def test_three_lines_at_the_start_of_a_fit(tokenizer, corpus: str, caplog: pytest.LogCaptureFixture) -> None:
    data = InstructionDataModule(tokenizer, JsonLines(corpus), batch_size=4, max_length=40)
    with caplog.at_level("INFO", "lightning.pytorch.utilities.rank_zero"):
        Trainer(**QUIET, max_steps=1).fit(DistillationModule(gpt2(), gpt2(24)), data)
    (summary,) = [record.getMessage() for record in caplog.records if record.getMessage().startswith("Data: ")]
    first, second, third = summary.splitlines()
    assert (
        first == "Data: 32 train, 2 validation, 2 test samples; template 'plain', all_turns learnt, at most 40 tokens"
    )
    assert second.startswith("train 1 of 32 (pairs.jsonl, line ") and second.endswith(
        "learnt in 1 turn, between [[ and ]]:"
    )
    assert re.fullmatch(r"Say \w+ \d+\\n\[\[\w+ and \w+ again( yes)*<\|endoftext\|>\]\]", third)
