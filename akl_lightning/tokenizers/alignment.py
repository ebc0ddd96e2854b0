"""Where two tokenizations of one response stand at the same byte of its text."""

from collections.abc import Collection, Sequence

from akl_lightning.tokenizers.bytes import GAP, TokenBytes

NONE = -1
"""In place of a token's number: the other tokenization has none there."""


class Side:
    """One tokenization of a response.

    Args:
        tokenizer: whose tokens they are.
        tokens: ids of the response, what ends it included; perhaps cut.
        ends: ids of the tokens that end a response.
    """

    def __init__(self, tokenizer: TokenBytes, tokens: Sequence[int], ends: Collection[int]) -> None:
        # Behind the end a template may have more. One that is an ordinary token may be text, but for the last.
        found = (i for i, token in enumerate(tokens) if token in ends and tokenizer.of(token) is None)
        self.end = next(found, len(tokens) - 1 if len(tokens) and tokens[-1] in ends else None)
        """Number of the token that ends the response, or None where it is cut."""
        said = [tokenizer.of(token) or GAP for token in tokens[: self.end]]
        self.body = b"".join(said)
        """What the tokens before the end say."""
        self.begins, offset = [], 0
        """At which byte of the body each of them begins."""
        for of in said:
            self.begins.append(offset)
            offset += len(of)
        self.length = len(tokens)

    def find(self, text: bytes) -> int | None:
        """At which byte of the body a text begins, of which the rest may be cut off; None where it is not there."""
        if not text:
            return len(self.body)
        # The last place: what a template writes comes before.
        if (place := self.body.rfind(text)) >= 0:
            return place
        body, bare = self.body.lstrip(), text.lstrip()
        if self.end is None and bare.startswith(body):
            return len(self.body) - len(body) - (len(text) - len(bare))
        return None


def align(student: Side, teacher: Side, text: str) -> list[int] | None:
    """For each token of the student, the teacher's that begins at the same byte of the text.

    A model that has read the same bytes predicts what comes next, whatever its tokens are. The token that ends the
    response goes with the one that ends it for the teacher. What is no part of the text (of a template, a space that a
    tokenizer puts before it) is not aligned.

    Args:
        student: its tokens.
        teacher: likewise.
        text: the response. Where a template has changed it, what the student's tokens say is taken.

    Returns:
        Numbers of the teacher's tokens, :data:`NONE` where there is none, ``[tokens]``; None where the two do not say
        the same.
    """
    body = student.body.strip()
    # Where no token says a text, the two are not the same for saying nothing.
    changed = [body] if body and GAP not in body else []
    for said in dict.fromkeys((text.encode(), text.strip().encode(), *changed)):
        of_student, of_teacher = student.find(said), teacher.find(said)
        if of_student is not None and of_teacher is not None:
            break
    else:
        return None
    begun = teacher.find(text.strip().encode())
    if student.end is None and begun is not None:  # what is left of the text may be said in it again
        first = teacher.body.find(said, max(begun, 0))
        of_teacher = first if first >= 0 else of_teacher
    return _aligned(student, teacher, (of_student, of_teacher), len(said) - 1, True)


def align_from(student: Side, teacher: Side, begins: tuple[int, int]) -> list[int]:
    """:func:`align`, from some byte of either on, as far as both say the same.

    The first token that says something else is aligned, too: up to it, both have read the same. So is the one behind
    what the teacher says, if that ends.

    Args:
        student: its tokens.
        teacher: likewise.
        begins: the byte of either.
    """
    rests = [side.body[begin:] for side, begin in zip((student, teacher), begins, strict=True)]
    last = next(
        (place for place, both in enumerate(zip(*rests, strict=False)) if len({*both}) > 1), min(map(len, rests))
    )
    return _aligned(student, teacher, begins, last, last == max(map(len, rests)))


def _aligned(student: Side, teacher: Side, begins: tuple[int, int], last: int, whole: bool) -> list[int]:
    """Those up to a last byte, and those that end a response where all of it is the same."""
    places = {begin - begins[1]: number for number, begin in enumerate(teacher.begins)}
    if teacher.end is not None:
        places[len(teacher.body) - begins[1]] = teacher.end
    offsets = (begin - begins[0] for begin in student.begins)
    aligned = [places.get(offset, NONE) if 0 <= offset <= last else NONE for offset in offsets]
    aligned += [NONE] * (student.length - len(aligned))
    if whole and student.end is not None and teacher.end is not None:
        aligned[student.end] = teacher.end
    return aligned
