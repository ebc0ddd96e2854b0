"""The teacher's side of tokenized samples, where its tokenizer is not the student's."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from akl_lightning.cached import content_of, key_of, map_tables
from akl_lightning.data.chat import Chat, SampleError
from akl_lightning.data.collate import NO_TURN, TEACHER
from akl_lightning.data.records import content_text
from akl_lightning.errors import UsageError
from akl_lightning.rank_zero import rank_zero_info
from akl_lightning.tokenizers import alignment
from akl_lightning.tokenizers import bytes as bytes_
from akl_lightning.tokenizers.alignment import NONE, Side, align, align_from
from akl_lightning.tokenizers.bytes import TokenBytes

if TYPE_CHECKING:
    import datasets
    import pyarrow as pa

COLUMNS = (*TEACHER, "not_aligned")
"""What a tokenized split gets."""

_READ = ("messages", "tools", "cut", "file", "line", "input_ids", "spans", "turns")
"""Columns of a split that its other side depends on."""

REFUSED = 0.05
"""Share of samples that may be said otherwise by the teacher's tokenizer, and be dropped for that."""


class TeacherSide(NamedTuple):
    """A sample as the teacher reads it."""

    input_ids: list[int]
    """The teacher's tokens, prompt and responses; of a sample of which nothing is learnt the prompt alone."""

    spans: list[tuple[int, int]]
    """Which of them belong to responses, each from the first to behind the last."""

    aligned: list[int]
    """For each learnt token of the student the number of the teacher's that begins at the same byte, or -1."""

    turns: list[int]
    """Of each span the number of the assistant's turn, -1 where that is not known."""


class Pairing:
    """Writes samples a second time, as the teacher's template does it, and aligns what is learnt of them.

    Each turn of the assistant is aligned by itself, by the bytes of its text.

    Args:
        student: makes the data's tokens.
        teacher: makes the teacher's.
        longest: tokens that the teacher has positions for; what lies behind is not aligned. None for any number.

    Raises:
        UsageError: a tokenizer that does not tell the bytes of its tokens; a setting under which there are no turns.
    """

    def __init__(self, student: Chat, teacher: Chat, longest: int | None = None) -> None:
        if student.learn == "everything":
            raise UsageError(
                "data.learn everything learns prompts too, which student and teacher write by templates of their own: "
                "set it to all_turns where their tokenizers differ."
            )
        self.chats = student, teacher
        self.tokenizer = teacher.tokenizer
        self.longest = longest
        self.student = TokenBytes(student.tokenizer, "student")
        self.teacher = TokenBytes(teacher.tokenizer, "teacher")
        self._leads: dict[tuple[int, tuple[int, ...]], bytes] = {}

    def rows(self, rows: Sequence[Mapping[str, Any]]) -> list[TeacherSide | str]:
        """The teacher's side of rows of a tokenized split; where there is none, why.

        Args:
            rows: what they say (``messages``, ``tools``), their ``input_ids``, and ``spans`` (flattened) with ``turns``
                of what is learnt.
        """
        records = [self._record(row) for row in rows]
        says = [bool(record["messages"] or record["text"]) for record in records]
        encoded = iter(self.chats[1].encode_many([record for record, some in zip(records, says, strict=True) if some]))
        sides: list[TeacherSide | str] = []
        for row, some in zip(rows, says, strict=True):
            other = next(encoded) if some else SampleError("a block of it holds no whole character")
            sides.append(str(other) if isinstance(other, SampleError) else self._pair(row, other))
        return sides

    def response(self, prompts: tuple[Sequence[int], Sequence[int]], response: Sequence[int]) -> TeacherSide:
        """The teacher's side of a response that is known by its tokens alone, such as the student's own.

        It is aligned as far as both say the same text: up to the first token that is none, such as half a character or
        a special token, that included, where the teacher would have gone on otherwise; and no further than the teacher
        has positions.

        Args:
            prompts: what it answers, in the student's tokens and in the teacher's.
            response: the student's tokens, up to the one that ends it, or without one where it is cut.
        """
        student, teacher = self.chats
        mine = Side(self.student, response, student.end_tokens)
        leads = [self._lead(side, tuple(prompt[-1:])) for side, prompt in enumerate(prompts)]
        begin = len(leads[0]) if mine.body.startswith(leads[0]) else 0
        text = _begun(mine.body[begin:])
        ids = teacher.answer(prompts[1], text)
        if mine.end is not None or begin + len(text.encode()) < len(mine.body):
            ids = [*ids, teacher.end_tokens[0]]
        yours = Side(self.teacher, ids, teacher.end_tokens)
        first = len(prompts[1])
        aligned = [NONE if n == NONE else first + n for n in align_from(mine, yours, (begin, len(leads[1])))]
        side = self._cut([*prompts[1], *ids], [(first, first + len(ids))], [NO_TURN], aligned)
        return side if isinstance(side, TeacherSide) else TeacherSide(list(prompts[1]), [], [NONE] * len(aligned), [])

    def _lead(self, side: int, last: tuple[int, ...]) -> bytes:
        """What one of the two says before each answer to a prompt with this last token, if any."""
        if (side, last) not in self._leads:
            said = (self.student, self.teacher)[side].join(self.chats[side].answer(last, "a"))
            self._leads[side, last] = said.removesuffix(b"a")
        return self._leads[side, last]

    def _record(self, row: Mapping[str, Any]) -> dict[str, Any]:
        """What the teacher's template is given: of a document the block that the row is."""
        if row["messages"]:
            return {**row, "text": ""}
        side = Side(self.student, row["input_ids"], self.chats[0].end_tokens)
        text = side.body.replace(b"\xff", b"").decode(errors="ignore")
        return {**row, "text": text, "cut": side.end is None}

    def _pair(self, row: Mapping[str, Any], other: Any) -> TeacherSide | str:
        messages = json.loads(row["messages"]) if row["messages"] else []
        if not row["turns"]:
            fits = self.longest is None or len(other.prompt_ids) <= self.longest
            return TeacherSide(other.prompt_ids, [], [], []) if fits else self._too_long()
        texts = [content_text(message) for message in messages if message["role"] == "assistant"]
        mine = _by_turn(list(zip(row["spans"][::2], row["spans"][1::2], strict=True)), row["turns"])
        yours = _by_turn(other.spans, other.turns)
        learnt = [number for numbers in mine.values() for number in numbers]
        if not messages:  # the block's first token is the last of the one before, and not learnt
            texts = [self._record(row)["text"]]
            mine, yours = {0: [*range(len(row["input_ids"]))]}, {0: [*range(len(other.input_ids))]}
        places: dict[int, int] = {}
        for turn, numbers in mine.items():
            if turn in yours:
                found = self._align(row["input_ids"], numbers, other.input_ids, yours[turn], texts[turn])
                if found is None:
                    return self._why(texts[turn])
                places |= zip(numbers, found, strict=True)
        aligned = [places.get(number, NONE) for number in learnt]
        return self._cut(other.input_ids, other.spans, other.turns, aligned)

    def _cut(
        self, ids: list[int], spans: list[tuple[int, int]], turns: list[int], aligned: list[int]
    ) -> TeacherSide | str:
        end = len(ids) if self.longest is None else self.longest
        kept = [(start, min(stop, end)) for start, stop in spans if start < end]
        if spans and not kept:
            return self._too_long()
        ids = ids[: min(end, kept[-1][1])] if kept else ids[:end]
        aligned = [number if number < len(ids) else NONE for number in aligned]
        return TeacherSide(ids, kept, aligned, list(turns[: len(kept)]))

    def _too_long(self) -> str:
        return f"its prompt is longer than the {self.longest:,} positions of the teacher"

    @property
    def digest(self) -> str:
        """What tells it from others."""
        said = [
            [chat.digest, tokens.digest] for chat, tokens in zip(self.chats, (self.student, self.teacher), strict=True)
        ]
        return hashlib.sha256(json.dumps([said, self.longest]).encode()).hexdigest()

    def _align(
        self, mine: Sequence[int], numbers: Sequence[int], yours: Sequence[int], others: Sequence[int], text: str
    ) -> list[int] | None:
        student = Side(self.student, [mine[number] for number in numbers], self.chats[0].end_tokens)
        teacher = Side(self.teacher, [yours[number] for number in others], self.chats[1].end_tokens)
        found = align(student, teacher, text)
        return found and [NONE if number == NONE else others[number] for number in found]

    def _why(self, text: str) -> str:
        says = [side.encode(text) and side.join(side.encode(text)).strip() for side in (self.student, self.teacher)]
        whose = [role for role, said in zip(("student", "teacher"), says, strict=True) if said != text.encode().strip()]
        if whose:
            return f"the {whose[0]}'s tokenizer does not say its text ({_shown(text)}) byte by byte"
        return f"the templates of student and teacher do not write the same response ({_shown(text)})"


def _begun(said: bytes) -> str:
    """The text with which some bytes begin, up to what is no character."""
    try:
        return said.decode()
    except UnicodeDecodeError as error:
        return said[: error.start].decode()


def _shown(text: str) -> str:
    return repr(text if len(text) <= 40 else text[:40] + "…")


def _by_turn(spans: Sequence[tuple[int, int]], turns: Sequence[int]) -> dict[int, list[int]]:
    """Numbers of the learnt tokens of each turn, in order."""
    of: dict[int, list[int]] = {}
    for (start, stop), turn in zip(spans, turns, strict=True):
        of.setdefault(turn, []).extend(range(start, stop))
    return of


# --------------------------------------------------------------------------------------------------------------------
# Whole splits


def align_splits(
    splits: "Mapping[str, datasets.Dataset]", pairing: Pairing, num_proc: int = 0
) -> "dict[str, datasets.Dataset]":
    """The splits with the teacher's side of each sample, :data:`COLUMNS`; what comes of it is said.

    Args:
        splits: tokenized.
        pairing: aligns them.
        num_proc: processes that do it, where there is much of it.

    Raises:
        UsageError: more than :data:`REFUSED` of the samples are not the same text for both.
    """
    written = {split: _written(rows, split, pairing, num_proc) for split, rows in splits.items()}
    refused = {split: [why for why in rows["not_aligned"] if why] for split, rows in written.items()}
    count, whole = sum(map(len, refused.values())), sum(map(len, written.values()))
    if count > REFUSED * whole:
        why = next(reason for of in refused.values() for reason in of)
        raise UsageError(
            f"{count:,} of {whole:,} samples cannot be aligned with the teacher, the first because {why}: take "
            "models that read such samples as they are, or leave these out."
        )
    return {split: _aligned_alone(rows, split, refused[split]) for split, rows in written.items()}


def _written(rows: "datasets.Dataset", split: str, pairing: Pairing, num_proc: int) -> "datasets.Dataset":
    import datasets

    if set(COLUMNS) <= set(rows.column_names):  # of another teacher
        rows = rows.remove_columns(list(COLUMNS))
    of_teacher = {name: datasets.List(datasets.Value("int32")) for name in TEACHER}
    features = datasets.Features({**rows.features, **of_teacher, "not_aligned": datasets.Value("string")})
    if not len(rows):
        return datasets.Dataset.from_dict({name: [] for name in features}, features)
    key = key_of([content_of(rows, _READ)[0], pairing.digest, COLUMNS], (alignment, bytes_))
    return map_tables(rows, _with_sides, {"pairing": pairing}, key, features, num_proc, f"Aligning {split}")


# A function of its arguments alone, which name the file that its result is cached in.
def _with_sides(rows: "pa.Table", pairing: Pairing) -> "pa.Table":
    import pyarrow as pa

    sides = pairing.rows(rows.select(_READ).to_pylist())
    good = [side if isinstance(side, TeacherSide) else TeacherSide([], [], [], []) for side in sides]
    of_teacher = {
        "teacher_input_ids": [side.input_ids for side in good],
        "teacher_spans": [[place for span in side.spans for place in span] for side in good],
        "teacher_turns": [side.turns for side in good],
        "aligned": [side.aligned for side in good],
    }
    for name, values in of_teacher.items():
        rows = rows.append_column(name, pa.array(values, pa.list_(pa.int32())))
    return rows.append_column("not_aligned", pa.array([side if isinstance(side, str) else "" for side in sides]))


def _aligned_alone(rows: "datasets.Dataset", split: str, refused: Sequence[str]) -> "datasets.Dataset":
    """Without those that are not, and a word about both."""
    if not len(rows):
        return rows
    table = rows.select_columns(["aligned"]).with_format("arrow")[:]
    places = table["aligned"].combine_chunks().flatten().to_numpy(zero_copy_only=False)
    if not len(places) and not refused:  # prompts alone
        return rows
    share = 100 * (places != NONE).mean() if len(places) else 0.0
    dropped = f"; {len(refused):,} of {len(rows):,} samples dropped, the first because {refused[0]}" if refused else ""
    rank_zero_info(f"{split}: {share:.1f} % of {len(places):,} response tokens are aligned with the teacher's{dropped}")
    if not refused:
        return rows
    return rows.select([number for number, why in enumerate(rows["not_aligned"]) if not why])
