"""What a pair of tokenizers makes of a text, to be known before a run: ``akl tokenizers``."""

import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.table import Table
from transformers import PreTrainedTokenizerBase

from akl_lightning.data.chat import Chat
from akl_lightning.data.files import ending
from akl_lightning.data.records import Source, content_text
from akl_lightning.data.sources import Docstrings, Files
from akl_lightning.errors import UsageError
from akl_lightning.models.load import load_tokenizer
from akl_lightning.tokenizers.alignment import NONE, Side, align
from akl_lightning.tokenizers.bytes import TokenBytes
from akl_lightning.tokenizers.classes import Partition, Vocabulary, members, partition

_LARGEST, _EXAMPLES, _TEXTS = 5, 6, 1000


@dataclass
class PairFigures:
    """What was counted on some texts; tokens are those of the student, what ends a text included."""

    texts: int = 0
    refused: int = 0
    """Texts that the two do not say alike."""

    tokens: int = 0
    of_teacher: int = 0
    """The teacher's tokens."""

    aligned: int = 0
    shared: int = 0
    """Tokens of the student that the teacher has, too."""

    agreeing: int = 0
    """Aligned tokens whose class is that of the teacher's next token."""


def count_pair(student: Vocabulary, teacher: Vocabulary, classes: Partition, texts: Iterable[str]) -> PairFigures:
    """Split texts with both tokenizers and count.

    Args:
        student: one vocabulary.
        teacher: the other one.
        classes: of the two.
        texts: responses.
    """
    said, figures = set(teacher.tokens.bytes), PairFigures()
    of_student, of_teacher = classes.student.tolist(), classes.teacher.tolist()
    for text in texts:
        mine, yours = ([*side.tokens.encode(text), *sorted(side.ends)[:1]] for side in (student, teacher))
        aligned = align(Side(student.tokens, mine, student.ends), Side(teacher.tokens, yours, teacher.ends), text)
        figures.texts += 1
        if aligned is None:
            figures.refused += 1
            continue
        figures.tokens += len(mine)
        figures.of_teacher += len(yours)
        figures.shared += sum(token in student.ends or student.of(token) in said for token in mine)
        pairs = [(token, yours[place]) for token, place in zip(mine, aligned, strict=True) if place != NONE]
        figures.aligned += len(pairs)
        figures.agreeing += sum(of_student[one] == of_teacher[other] for one, other in pairs)
    return figures


def vocabulary_of(tokenizer: PreTrainedTokenizerBase, role: str) -> Vocabulary:
    """A tokenizer without a model, whose responses end as its own chat template has it."""
    tokens = TokenBytes(tokenizer, role)
    try:
        ends = Chat(tokenizer).end_tokens
    except UsageError as error:
        raise UsageError(f"of the {role}'s tokenizer: {error}") from error
    return Vocabulary(tokens, ends, len(tokens))


def compare_tokenizers(teacher: str, student: str, text: Path | None = None, trust_remote_code: bool = False) -> None:
    """Print what a student could learn from a teacher with another tokenizer.

    Args:
        teacher: hub name or folder of a model or tokenizer.
        student: likewise.
        text: a file of records as ``data.source.path`` takes it, whose responses and documents are split, or of plain
            text, each paragraph of which is; the documentation of Python by default.
        trust_remote_code: run Python code that comes with a tokenizer.

    Raises:
        UsageError: a tokenizer or text that cannot be read, or does not tell the bytes of its tokens.
    """
    if text is None or ending(text):
        texts = _responses(Docstrings() if text is None else Files(str(text)))
    else:
        texts = list(_paragraphs(text))
    mine, yours = (
        vocabulary_of(load_tokenizer(name, trust_remote_code), role)
        for name, role in ((student, "student"), (teacher, "teacher"))
    )
    classes = partition(mine, yours)
    console = Console()
    console.print(vocabulary_table(mine, yours, classes))
    console.print(class_table(mine, yours, classes))
    console.print(text_table(count_pair(mine, yours, classes, texts), sum(len(one.encode()) for one in texts)))


def _paragraphs(path: Path) -> Iterator[str]:
    try:
        content = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"{path} is no text in UTF-8 that can be read: {error}.") from error
    if not content.strip():
        raise UsageError(f"{path} is empty: give a text to split.")
    yield from (part.strip("\n") for part in content.split("\n\n") if part.strip())


def _share(part: int, whole: int) -> str:
    return f"{part:,} ({100 * part / max(1, whole):.1f} %)"


def vocabulary_table(student: Vocabulary, teacher: Vocabulary, classes: Partition) -> Table:
    """How the two vocabularies meet."""
    said = [{of for token in range(side.outputs) if (of := side.of(token))} for side in (student, teacher)]
    shared = len(said[0] & said[1])
    table = Table("", "student", "teacher", title=f"{classes.classes:,} classes over both vocabularies", min_width=60)
    table.add_row("tokens", *(f"{side.outputs:,}" for side in (student, teacher)))
    table.add_row("shared", *(_share(shared, side.outputs) for side in (student, teacher)))
    rest = [(sides == classes.classes - 1).sum().item() for sides in (classes.student, classes.teacher)]
    table.add_row("in the last class, of what cannot be compared", *(f"{number:,}" for number in rest))
    lacking = [side.tokens.lacking() for side in (student, teacher)]
    table.add_row("bytes that no token says", *(_some([f"{byte:02x}" for byte in of]) for of in lacking))
    return table


def class_table(student: Vocabulary, teacher: Vocabulary, classes: Partition) -> Table:
    """The largest classes, with some of their tokens."""
    sides = members(classes, "student"), members(classes, "teacher")
    order = sorted(range(classes.classes), key=lambda number: -len(sides[0][number]) - len(sides[1][number]))
    table = Table("student", "teacher", title="The largest classes", min_width=60)
    for number in order[:_LARGEST]:
        of = [
            _some([_said(side, int(token)) for token in tokens[number]])
            for side, tokens in zip((student, teacher), sides, strict=True)
        ]
        table.add_row(*of)
    return table


def text_table(figures: PairFigures, size: int) -> Table:
    """What the two make of a text."""
    table = Table("", "", title=f"{figures.texts:,} texts of {size:,} bytes", show_header=False, min_width=60)
    table.add_row("not said alike, dropped", _share(figures.refused, figures.texts))
    table.add_row("tokens of student and teacher", f"{figures.tokens:,} and {figures.of_teacher:,}")
    table.add_row("positions of the student that are aligned", _share(figures.aligned, figures.tokens))
    table.add_row("next tokens that the teacher has, too", _share(figures.shared, figures.tokens))
    table.add_row("next tokens of one class, where aligned", _share(figures.agreeing, figures.aligned))
    return table


def _some(names: Sequence[str]) -> str:
    more = f" … ({len(names):,})" if len(names) > _EXAMPLES else ""
    return " ".join(names[:_EXAMPLES]) + more if names else "none"


def _said(side: Vocabulary, token: int) -> str:
    of = side.of(token)
    return f"[{token}]" if of is None else repr(of)[2:-1].replace(" ", "␣")


def _responses(source: Source) -> list[str]:
    """Documents and last responses, of records spread over those that a source trains on."""
    records = source.load()["train"]
    rows = records.select(range(0, len(records), max(1, len(records) // _TEXTS)))
    last = [json.loads(messages or "[{}]")[-1] for messages in rows["messages"]]
    responses = [content_text(message) if message.get("role") == "assistant" else "" for message in last]
    texts = [document or response for document, response in zip(rows["text"], responses, strict=True)]
    if not any(texts):
        raise UsageError(f"{source.description} has no response and no document to split: give a text.")
    return [text for text in texts if text]
