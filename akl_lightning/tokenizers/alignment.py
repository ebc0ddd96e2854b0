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
        # Behind the end a template may have more, and an end that is an ordinary token is text.
        self.end = next((i for i, token in enumerate(tokens) if token in ends and tokenizer.of(token) is None), None)
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
    places = {begin - of_teacher: number for number, begin in enumerate(teacher.begins)}
    aligned = [
        places.get(begin - of_student, NONE) if 0 <= begin - of_student < len(said) else NONE
        for begin in student.begins
    ]
    aligned += [NONE] * (student.length - len(aligned))
    if student.end is not None and teacher.end is not None:
        aligned[student.end] = teacher.end
    return aligned
