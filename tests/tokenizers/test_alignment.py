"""Positions of two tokenizations, aligned by hand."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from akl_lightning.tokenizers.alignment import NONE, Side, align, align_from
from akl_lightning.tokenizers.bytes import TokenBytes
from tests.tokenizers.tiny import END, byte_level, sentencepiece

STUDENT, TEACHER = byte_level(["t h", "Ġ a"]), byte_level(["Ġ t", "h e"], ["<stop>"])
PIECES = sentencepiece(["▁", "t", "h", "e", "a"], ["▁ t", "h e"])
BYTES = {id(each): TokenBytes(each, "model") for each in (STUDENT, TEACHER, PIECES)}


def side(tokenizer: object, text: str, end: bool = True, before: str = "", cut: int | None = None) -> Side:
    tokens = BYTES[id(tokenizer)]
    ids = [*tokens.encode(before + text), *([tokenizer.eos_token_id] if end else [])][:cut]
    return Side(tokens, ids, [tokenizer.eos_token_id])


def test_tokens_that_begin_at_the_same_byte_are_aligned() -> None:
    # th|e| a| |th|e|END and t|he| |a| t|he|STOP
    text = "the a the"
    assert align(side(STUDENT, text), side(TEACHER, text), text) == [0, NONE, 2, 4, NONE, NONE, 6]


def test_the_end_is_aligned_by_its_role() -> None:
    assert align(side(STUDENT, ""), side(TEACHER, ""), "") == [0]
    assert align(side(STUDENT, "a"), side(TEACHER, "a"), "a") == [0, 1]
    # Whatever a template writes before it.
    assert align(side(STUDENT, "a"), side(TEACHER, "a\n"), "a") == [0, 2]


def side_ids(tokenizer: object, text: str) -> list[int]:
    return [*BYTES[id(tokenizer)].encode(text), tokenizer.eos_token_id]


def test_a_text_that_no_token_says_is_not_the_same_on_both_sides() -> None:
    for unknown in ("<unk>", None):  # a token in its place, or none
        lacking = sentencepiece(["▁", "t"], fallback=False)
        lacking.backend_tokenizer.model.unk_token = unknown
        tokens = TokenBytes(lacking, "model")
        ids = tokens.encode("x")
        assert tokens.join(ids) in (b"", b" ", b"\xff", b" \xff")
        sides = [Side(tokens, [*ids, lacking.eos_token_id], [lacking.eos_token_id]) for _ in range(2)]
        assert align(*sides, "x") is None


def test_what_is_cut_off_is_not_aligned() -> None:
    text = "eeee"
    assert align(side(STUDENT, text), side(TEACHER, text, cut=2), text) == [0, 1, NONE, NONE, NONE]
    assert align(side(STUDENT, text, cut=2), side(TEACHER, text), text) == [0, 1]


def test_a_space_that_a_tokenizer_puts_before_a_text_is_none_of_it() -> None:
    # ▁t|he|END: the first token says " t", of which the text has "t" alone.
    assert align(side(PIECES, "the"), side(TEACHER, "the"), "the") == [NONE, 1, 2]
    assert align(side(TEACHER, "the"), side(PIECES, "the"), "the") == [NONE, 1, 2]
    # ▁|a|END: it stands alone.
    assert align(side(PIECES, "a"), side(TEACHER, "a"), "a") == [NONE, 0, 1]
    assert align(side(TEACHER, "a"), side(PIECES, "a"), "a") == [1, 2]
    assert align(side(PIECES, "the"), side(PIECES, "the"), "the") == [NONE, 1, 2]


def test_a_template_may_write_something_before_the_text() -> None:
    assert align(side(STUDENT, "a", before="n"), side(TEACHER, "a", before="xyz "), "a") == [NONE, 4, 5]
    assert align(side(STUDENT, "ee"), side(TEACHER, "ee"), " ee\n") == [0, 1, 2]  # which both have trimmed


def test_a_character_may_be_cut_between_tokens() -> None:
    emoji = "👍"  # f0 9f 91 8d
    two = byte_level(["ð Ł"])
    BYTES[id(two)] = TokenBytes(two, "model")
    assert align(side(two, emoji), side(STUDENT, emoji), emoji) == [0, 2, 3, 4]
    assert align(side(STUDENT, emoji), side(two, emoji), emoji) == [0, NONE, 1, 2, 3]


def test_texts_that_differ_are_not_aligned() -> None:
    assert align(side(STUDENT, "ab"), side(TEACHER, "ba"), "ab") is None
    # With a special token in the text on one side alone.
    tokens = BYTES[id(STUDENT)]
    special = Side(tokens, [*tokens.encode("a"), STUDENT.eos_token_id, *tokens.encode("b")], [])
    assert align(special, side(TEACHER, f"a{END}b"), f"a{END}b") is None


def test_an_end_that_is_written_in_the_text_as_text_is_text() -> None:
    text = "a<end>b"
    tokens = [token for piece in ("a<en", "d>b") for token in BYTES[id(STUDENT)].encode(piece)]
    student = Side(BYTES[id(STUDENT)], [*tokens, STUDENT.eos_token_id], [STUDENT.eos_token_id])
    assert align(student, side(TEACHER, text), text) == list(range(8))


def test_an_end_that_is_an_ordinary_token_is_one_where_it_comes_last() -> None:
    ordinary = byte_level(["t h"], [])
    ordinary.add_tokens(["<over>"])
    tokens, end = TokenBytes(ordinary, "model"), ordinary.convert_tokens_to_ids("<over>")
    assert tokens.of(end) == b"<over>"
    teacher = Side(tokens, [*tokens.encode("the"), end], [end])
    assert align(side(STUDENT, "the"), teacher, "the") == [0, 1, 2]
    assert Side(tokens, [end, *tokens.encode("the")], [end]).end is None


def test_what_is_left_of_a_cut_response_is_found_where_it_begins() -> None:
    # The student's template has left out "x:", and what is left of the rest comes again.
    text = "x:the a the"
    assert align(side(STUDENT, "the a the", cut=2), side(TEACHER, text, before="the"), text) == [4, NONE]


@pytest.mark.parametrize(
    ("mine", "yours", "expected"),
    [
        ("the a", "the a", [0, NONE, 2]),
        ("the axe", "the b", [0, NONE, 2, NONE, NONE]),  # th|e| a|x|e and t|he| |b: behind "the " they differ
        ("a", "ab", [0]),
        ("ab", "a", [0, NONE]),
        ("", "a", []),
    ],
)
def test_two_texts_are_aligned_as_far_as_both_say_the_same(mine: str, yours: str, expected: list[int]) -> None:
    assert align_from(side(STUDENT, mine, end=False), side(TEACHER, yours, end=False), (0, 0)) == expected
    # Behind a lead of each, and with ends, which are aligned where all is the same; else the teacher's is what it says
    # behind its last word.
    student, teacher = side(STUDENT, mine, before="n"), side(TEACHER, yours, before="nx")
    found = align_from(student, teacher, (1, 2))
    moved = [NONE if number == NONE else number + 2 for number in expected]
    if (mine, yours) == ("ab", "a"):
        moved[1] = teacher.end
    assert found == [NONE, *moved, teacher.end if mine == yours else NONE]


@settings(max_examples=100, deadline=None)
@given(st.text(max_size=30).filter(lambda text: END not in text and "<stop>" not in text))
def test_aligned_tokens_have_said_the_same(text: str) -> None:
    student, teacher = side(STUDENT, text), side(TEACHER, text)
    aligned = align(student, teacher, text)
    assert aligned is not None and aligned[-1] == teacher.end
    begins = [student.body[:begin] for begin in student.begins], [teacher.body[:begin] for begin in teacher.begins]
    for number, other in enumerate(aligned[:-1]):
        assert (begins[0][number] in begins[1]) == (other != NONE)
        assert other == NONE or begins[0][number] == begins[1][other]


@pytest.mark.parametrize("text", ["the a the", "at the"])
def test_one_tokenizer_is_aligned_with_itself(text: str) -> None:
    assert align(side(STUDENT, text), side(STUDENT, text), text) == list(range(len(side_ids(STUDENT, text))))
