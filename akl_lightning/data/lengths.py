"""Samples that are longer than a row may be: what is cut of them, and what is dropped."""

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Literal

from akl_lightning.data.chat import Encoded
from akl_lightning.data.rendering import SampleError

Record = Mapping[str, Any]
"""A row of :data:`~akl_lightning.data.records.RECORD_FEATURES`."""

Encode = Callable[[Sequence[Record]], Sequence[Encoded | SampleError]]
"""Gives the tokens of records, or why the template cannot write one."""

Truncate = Literal["drop", "end", "start_turns"]


@dataclass(frozen=True)
class Lengths:
    """How long a row may be.

    Args:
        max_length: tokens of a row.
        max_prompt_length: tokens of a prompt; None for ``max_length`` - 1.
        truncate: what becomes of a conversation that is longer. ``end``: its end is cut off, so that its first turns
            are kept; ``start_turns``: whole first turns are left out, but for the system's, so that its last ones are
            kept; ``drop``: none of it is.
    """

    max_length: int
    max_prompt_length: int | None = None
    truncate: Truncate = "end"

    @property
    def longest_prompt(self) -> int:
        """Tokens that a prompt may have."""
        return self.max_length - 1 if self.max_prompt_length is None else self.max_prompt_length

    @property
    def bound(self) -> str:
        """The setting that bounds prompts."""
        return "data.max_length" if self.max_prompt_length is None else "data.max_prompt_length"


@dataclass(kw_only=True)
class Fitted(Encoded):
    """A row, or a sample that is dropped.

    Its tokens go up to the last learnt one, or are those of the prompt where nothing is learnt; of a sample that is
    dropped there are none.
    """

    record: Record
    """With the messages that are left."""

    whole: int
    """Tokens of the sample before anything was cut; of a prompt that is too long, those of the prompt."""

    note: str = ""
    """What has become of it, in one word or, where the template refused it, in a sentence; empty for nothing."""

    kept: bool = True
    """Whether it is a row."""


def _dropped(record: Record, whole: int, note: str) -> Fitted:
    return Fitted([], record=record, whole=whole, note=note, kept=False)


def fit(records: Sequence[Record], encode: Encode, lengths: Lengths) -> list[Fitted]:
    """Rows of at most so many tokens.

    A conversation is cut between turns by leaving out messages and writing the others anew, so that a row is always
    what the template makes of some messages. A response that is cut learns no end.

    Args:
        records: conversations and documents.
        encode: gives their tokens.
        lengths: what fits.

    Returns:
        A row for each conversation, and as many as it takes for a document; in the records' order.
    """
    fitted: list[list[Fitted]] = [[] for _ in records]
    now, whole, notes = list(records), [0] * len(records), [""] * len(records)
    waiting = list(range(len(records)))
    while waiting:
        longer = []
        for index, encoded in zip(waiting, encode([now[index] for index in waiting]), strict=True):
            if isinstance(encoded, SampleError):
                fitted[index] = [_dropped(records[index], 0, str(encoded))]
                continue
            if records[index]["text"]:
                fitted[index] = list(_blocks(records[index], encoded, lengths.max_length))
                continue
            whole[index] = whole[index] or _length(encoded)
            shorter = _LEAVE_OUT[lengths.truncate](json.loads(now[index]["messages"]), encoded, lengths)
            if shorter is None:
                fitted[index] = [_row(now[index], encoded, whole[index], notes[index], lengths)]
            else:
                now[index] = {**now[index], "messages": json.dumps(shorter, ensure_ascii=False)}
                if lengths.truncate == "end":  # they were of the last turn
                    now[index] = {**now[index], "cut": False, "references": []}
                notes[index] = lengths.truncate
                longer.append(index)
        waiting = longer
    return [row for rows in fitted for row in rows]


def _length(encoded: Encoded) -> int:
    """Tokens of a row: nothing is learnt of those behind the last learnt one, and no other sees them."""
    return encoded.spans[-1][1] if encoded.spans else len(encoded.prompt_ids)


# --------------------------------------------------------------------------------------------------------------------
# Conversations


def _leave_out_none(messages: list[Any], encoded: Encoded, lengths: Lengths) -> list[Any] | None:
    return None


def _leave_out_last(messages: list[Any], encoded: Encoded, lengths: Lengths) -> list[Any] | None:
    """The messages up to the last learnt turn of which something fits, or None where that is the last one."""
    inside = [turn for turn, (start, _) in zip(encoded.turns, encoded.spans, strict=True) if start < lengths.max_length]
    spoken = [index for index, message in enumerate(messages) if message["role"] == "assistant"]
    if not inside or inside[-1] + 1 >= len(spoken) or inside[-1] == encoded.turns[-1]:
        return None
    return messages[: spoken[inside[-1]] + 1]


def _leave_out_first(messages: list[Any], encoded: Encoded, lengths: Lengths) -> list[Any] | None:
    """The messages from the first question with which all fits, behind the system's, or None where no more can go."""
    excess = max(_length(encoded) - lengths.max_length, len(encoded.prompt_ids) - lengths.longest_prompt)
    head = next((index for index, message in enumerate(messages) if message["role"] != "system"), 0)
    pairs = enumerate(pairwise(message["role"] for message in messages), 1)
    questions = [index for index, roles in pairs if roles == ("assistant", "user")]
    if excess <= 0 or not questions:
        return None
    begins, *starts = encoded.starts
    # Where it is not known where they stand, one after the other.
    enough = [index for index, start in zip(questions, starts, strict=False) if start - begins >= excess]
    known = len(starts) == len(questions)
    return messages[:head] + messages[(enough or questions[-1:])[0] if known else questions[0] :]


_LEAVE_OUT = {"drop": _leave_out_none, "end": _leave_out_last, "start_turns": _leave_out_first}


def _row(record: Record, encoded: Encoded, whole: int, note: str, lengths: Lengths) -> Fitted:
    """What fits of a conversation, in whose last turn the row ends."""
    length, prompt, end = _length(encoded), len(encoded.prompt_ids), lengths.max_length
    first = encoded.spans[0][0] if encoded.spans else prompt
    unasked = prompt > lengths.longest_prompt and (lengths.max_prompt_length is not None or not encoded.spans)
    if unasked or first >= end:
        return _dropped(record, prompt if unasked else first, "prompt")
    if length > end and lengths.truncate == "drop":
        return _dropped(record, whole, "drop")
    if length > end:
        note = note or "response"
    spans = [(start, min(stop, end)) for start, stop in encoded.spans if start < end]
    row = Fitted(**vars(encoded), record=record, whole=whole, note=note)
    row.spans, row.turns = spans, encoded.turns[: len(spans)]
    row.input_ids = encoded.input_ids[: spans[-1][1]] if spans else encoded.prompt_ids
    if prompt > lengths.longest_prompt:  # it is not asked
        row.prompt, row.prompt_ids = "", []
    return row


# --------------------------------------------------------------------------------------------------------------------
# Documents


def _blocks(record: Record, encoded: Encoded, max_length: int) -> Iterator[Fitted]:
    """Blocks of a document; each begins with the last token of the one before, so that each token is learnt once."""
    record = {**record, "text": ""}  # or each of its blocks would hold all of it
    ids, whole = encoded.input_ids, len(encoded.input_ids)
    if whole < 2:
        yield _dropped(record, whole, "nothing")
    for start in range(0, whole - 1, max_length - 1):
        stop = min(start + max_length, whole)
        row = Fitted(**vars(encoded), record=record, whole=whole, note="block" if whole > max_length else "")
        row.input_ids = ids[start:stop]
        row.spans = [
            (max(first, start + 1) - start, min(last, stop) - start)
            for first, last in encoded.spans
            if first < stop and last > start + 1
        ]
        row.turns = [0] * len(row.spans)
        row.kept = bool(row.spans)
        yield row
