"""Ways to compare two vocabularies, by hand; and the evidence's two commands on a small teacher."""

import json
from functools import partial
from pathlib import Path

import pytest
import torch

from akl_lightning.errors import UsageError
from akl_lightning.tokenizers.classes import Partition, Vocabulary
from recipes.other_tokenizer import (
    PARTITIONS,
    error,
    error_at,
    first_bytes,
    longest_prefix,
    shared_and_rest,
    token_behind,
    train,
    vocabulary,
)
from tests.conftest import PAIRS, gpt2
from tests.tokenizers.tiny import END, byte_level

STUDENT, TEACHER = byte_level(["t h", "Ġ a"]), byte_level(["Ġ t", "t h", "th e"], ["<stop>"])


def together(found: Partition, student: Vocabulary, teacher: Vocabulary, of: bytes) -> tuple[set, set]:
    """What is compared with a token of the teacher: tokens of the student, and of the teacher."""
    number = found.teacher[teacher.tokens.bytes.index(of)]
    return tuple(
        {side.of(token) for token in range(side.outputs) if classes[token] == number}
        for side, classes in ((student, found.student), (teacher, found.teacher))
    )  # type: ignore[return-value]


def test_ways_to_compare() -> None:
    student, teacher = vocabulary(STUDENT), vocabulary(TEACHER)
    rest = shared_and_rest(student, teacher)
    assert together(rest, student, teacher, b"th") == ({b"th"}, {b"th"})
    assert together(rest, student, teacher, b"the") == ({b" a"}, {b"the", b" t"})
    prefix = longest_prefix(student, teacher)
    assert together(prefix, student, teacher, b"the") == ({b"th"}, {b"th", b"the"})
    assert together(prefix, student, teacher, b" t") == ({b" "}, {b" ", b" t"})
    byte = first_bytes(student, teacher)
    assert together(byte, student, teacher, b"the") == ({b"t", b"th"}, {b"t", b"th", b"the"})
    for found in (rest, prefix, byte):
        assert found.student[STUDENT.eos_token_id] == found.teacher[TEACHER.eos_token_id]
        assert int(torch.cat(found[:2]).max()) < found.classes


def test_the_token_behind_some_bytes() -> None:
    side = vocabulary(STUDENT)
    assert side.of(token_behind(side, b"a", b"a the", False)) == b" "
    assert token_behind(side, b"a t", b"a the", False) == -1  # "th" is one token
    assert STUDENT.convert_ids_to_tokens(token_behind(side, b"a", b"a", True)) == END


@pytest.fixture
def output(tmp_path: Path) -> Path:
    (tmp_path / "out/data").mkdir(parents=True)
    for name, pairs in (("train", PAIRS[:12]), ("test", PAIRS[12:18])):
        lines = [json.dumps({key: pair[key] for key in ("instruction", "output")}) for pair in pairs]
        (tmp_path / f"out/data/{name}.jsonl").write_text("\n".join(lines))
    TEACHER.save_pretrained(tmp_path / "teacher")
    gpt2(24, len(TEACHER), positions=256).save_pretrained(tmp_path / "teacher")
    return tmp_path / "out"


def test_the_error_of_each_way(output: Path) -> None:
    run = partial(error, output, str(output.parent / "teacher"), ["own1k"], positions=4, samples=8, length=4)
    run()
    report, texts = output / "error.md", output / "error/texts.jsonl"
    lines, drawn = report.read_text().splitlines(), texts.read_text().splitlines()
    assert lines[0].startswith("4 positions, 8 texts of 4 tokens") and len(lines) == 6
    own = [cell.strip() for cell in lines[4].strip("|").split("|")]
    assert own[0] == "the teacher's own" and len(own) == 7 and own[1] == "4"
    # One that is killed while it writes goes on, to the same end.
    texts.write_text("\n".join(drawn[:2]) + "\n" + drawn[2][:9])
    run()
    assert texts.read_text().splitlines() == drawn and report.read_text().splitlines() == lines
    with pytest.raises(UsageError, match="another samples: give another --output"):
        run(samples=9)


def test_the_error_at_a_place() -> None:
    student, teacher = vocabulary(byte_level(["t h"])), vocabulary(byte_level(["h e"]))
    ids, end = teacher.tokens.encode, [*teacher.ends]
    texts = [ids("h."), ids("h."), ids(" b"), end]
    ways = {way: make(student, teacher) for way, make in PARTITIONS.items()}
    found = error_at(ids("at"), [*ids(" a"), *end], texts, student, teacher, ways)
    # For the student "th" is one token: two texts of four have no boundary; of the others one goes on with a space.
    assert found["none"] == 50 and found["classes_given"] == 0
    assert found["classes"] == found["rest"] == found["prefix"] == 50
    assert (found["behind"], found["data"]) == ("at", " a")
    assert not error_at(ids("at"), [*ids("h"), *end], texts, student, teacher, ways)


def test_every_way_is_tried_and_reported(output: Path) -> None:
    ways = ["ce", "uld", "rest-fkl", "prefix-akl", "classes-fkl", "classes-akl"]
    settings = {"epochs": 1, "batch_size": 4, "width": 16, "layers": 1, "lr": 1e-2}
    train(output, str(output.parent / "teacher"), ["own1k"], ways, [0, 1], **settings)
    raw = json.loads((output / "train.json").read_text())
    assert len(raw) == 12 and all(row["bits_per_byte"] > 0 and row["next_byte_kl"] > 0 for row in raw)
    assert "longest prefix (BPM), AKL" in (output / "train.md").read_text()
    # What is there is not done again.
    times = {path: path.stat().st_mtime_ns for path in output.rglob("result.json")}
    train(output, str(output.parent / "teacher"), ["own1k"], ways, [0, 1], **settings)
    assert {path: path.stat().st_mtime_ns for path in output.rglob("result.json")} == times
    with pytest.raises(UsageError, match="another epochs"):
        train(output, str(output.parent / "teacher"), ["own1k"], ways, [0], epochs=2)
