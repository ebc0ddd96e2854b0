"""Classes of tokens over two vocabularies, found by hand and on real tokenizers."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from transformers import PreTrainedTokenizerBase

from akl_lightning.errors import UsageError
from akl_lightning.tokenizers.bytes import TokenBytes
from akl_lightning.tokenizers.classes import Partition, Vocabulary, find_partition, members, partition
from tests.tokenizers.real import REAL, real
from tests.tokenizers.tiny import END, byte_level, sentencepiece


def vocabulary(tokenizer: PreTrainedTokenizerBase, padding: int = 0, ends: list[int] | None = None) -> Vocabulary:
    tokens = TokenBytes(tokenizer, "model")
    return Vocabulary(tokens, [tokenizer.eos_token_id] if ends is None else ends, len(tokens) + padding)


def said(found: Partition, student: Vocabulary, teacher: Vocabulary) -> set[tuple[frozenset, frozenset]]:
    """Classes by what their members say, the ends by theirs; those of one byte alone are left out."""
    names = [
        [END if token in side.ends else side.of(token) for token in range(side.outputs)] for side in (student, teacher)
    ]
    sides = [
        [frozenset(names[number][token] for token in of) for of in members(found, side)]
        for number, side in enumerate(("student", "teacher"))
    ]
    return {pair for pair in zip(*sides, strict=True) if pair[0] != pair[1] or len(next(iter(pair[0])) or b"12") > 1}


def test_a_token_without_partner_joins_what_the_other_side_begins_it_with() -> None:
    student, teacher = (
        vocabulary(byte_level(["t h", "th e", "x y"])),
        vocabulary(byte_level(["t h", "a b", "ab c"], ["<stop>"])),
    )
    assert said(partition(student, teacher), student, teacher) == {
        (frozenset({b"th", b"the"}), frozenset({b"th"})),  # "the" would begin with "th"
        (frozenset({b"x", b"xy"}), frozenset({b"x"})),
        (frozenset({b"a"}), frozenset({b"a", b"ab", b"abc"})),  # both begin with "a"
        (frozenset({END}), frozenset({END})),
    }


def test_classes_grow_together_where_merges_cross() -> None:
    student, teacher = vocabulary(byte_level(["a b", "ab c"])), vocabulary(byte_level(["a b", "ab d", "abd e", "c a"]))
    found = said(partition(student, teacher), student, teacher)
    assert (frozenset({b"ab", b"abc"}), frozenset({b"ab", b"abd", b"abde"})) in found
    assert (frozenset({b"c"}), frozenset({b"c", b"ca"})) in found


def test_duplicates_and_spaces_of_sentencepiece_are_the_bytes_they_say() -> None:
    student, teacher = vocabulary(byte_level(["Ġ t"])), vocabulary(sentencepiece(["▁", "t", "A"], ["▁ t"]))
    found = partition(student, teacher)
    of = {name: int(found.teacher[i]) for name, i in teacher.tokens._backend.get_vocab().items()}
    assert of["A"] == of["<0x41>"] == int(found.student[student.tokens._backend.token_to_id("A")])
    assert of["▁t"] == int(found.student[student.tokens._backend.token_to_id("Ġt")]) != of["▁"]
    assert of["▁"] == of["<0x20>"] == int(found.student[student.tokens._backend.token_to_id("Ġ")])
    assert of["<unk>"] == found.classes - 1  # the rest
    assert of[END] == int(found.student[student.ends[0]])
    # All 256 bytes, " t", the ends, and the rest.
    assert found.classes == 259


def test_what_the_other_side_cannot_say_is_the_rest() -> None:
    student, teacher = vocabulary(byte_level(), padding=3), vocabulary(sentencepiece(["▁", "t"], fallback=False))
    found = partition(student, teacher)
    assert found.classes == 4  # " ", "t", the ends, the rest
    rest = found.student == found.classes - 1
    assert rest.sum() == 254 + 3 and rest[-3:].all() and len(found.student) == 260


def test_special_tokens_go_by_their_role() -> None:
    of_student = byte_level(["t h"], ["<stop>", "<turn>", "<both>"])
    of_teacher = byte_level(["t h"], ["<both>", "<other>"])
    student = vocabulary(of_student, ends=of_student.convert_tokens_to_ids(["<stop>", "<turn>"]))
    teacher = vocabulary(of_teacher)  # whose <both> ends a response
    found = partition(student, teacher)
    classes = {
        name: int(found.student[of_student.convert_tokens_to_ids(name)]) for name in ("<stop>", "<turn>", "<both>")
    }
    end, rest = (int(found.teacher[of_teacher.convert_tokens_to_ids(name)]) for name in ("<both>", "<other>"))
    assert classes == {"<stop>": end, "<turn>": end, "<both>": rest} and rest == found.classes - 1 != end


def test_a_permuted_copy_is_one_to_one() -> None:
    student, teacher = vocabulary(byte_level(["t h", "th e"])), vocabulary(byte_level(["t h", "th e"], order=-1))
    found = partition(student, teacher)
    assert found.classes == 259 and not torch.equal(found.student, found.teacher)
    assert torch.equal(found.student.sort().values, torch.arange(259))
    assert torch.equal(found.teacher.sort().values, torch.arange(259))


def test_a_head_may_be_smaller_than_its_tokenizer() -> None:
    whole = vocabulary(byte_level(["t h", "th e"]))
    found = partition(whole._replace(outputs=250), whole)
    assert len(found.student) == 250 and len(found.teacher) == 259
    assert int(found.student.max()) < found.classes


def test_nothing_shared_is_refused() -> None:
    with pytest.raises(UsageError, match="share no token"):
        partition(vocabulary(sentencepiece(["a"], fallback=False)), vocabulary(sentencepiece(["b"], fallback=False)))


def test_classes_are_kept_on_disk(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path)
    student, teacher = vocabulary(byte_level(["t h"])), vocabulary(byte_level(["h e"]))
    made = find_partition(student, teacher)
    (file,) = tmp_path.rglob("classes-*")
    save_file({"student": made.student + 1, "teacher": made.teacher}, file)
    assert torch.equal(find_partition(student, teacher).student, made.student + 1)  # what lies there
    file.write_bytes(file.read_bytes()[:100])
    found = find_partition(student, teacher)  # made again, as what lies there is damaged
    assert found.classes == made.classes and torch.equal(found.student, made.student)
    find_partition(student._replace(ends=[]), teacher._replace(ends=[]))
    find_partition(teacher, student)
    assert len(list(tmp_path.rglob("classes-*"))) == 3


@pytest.mark.parametrize("name", REAL)
def test_real_tokenizers(name: str) -> None:
    """The table's numbers of shared tokens, and that every class of text has members on both sides."""
    student, teacher = vocabulary(byte_level(["t h", "th e", "Ġ the"])), vocabulary(real(name))
    found = partition(student, teacher)
    sides = [members(found, side) for side in ("student", "teacher")]
    assert all(len(one) and len(other) for one, other in zip(*(side[:-1] for side in sides), strict=True))
    shared = {of for of in student.tokens.bytes if of} & {of for of in teacher.tokens.bytes if of}
    assert len(shared) <= found.classes <= len(shared) + 2
