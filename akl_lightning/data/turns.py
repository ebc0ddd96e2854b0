"""Where the assistant's turns stand in a conversation that a chat template has written."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

from akl_lightning.data.records import Message, content_text
from akl_lightning.data.rendering import Rendering, SampleError, Written
from akl_lightning.data.templates import CLOSE, OPEN, marked_ranges

SPOT = "Whereto?"
"""Stands for the content of the message behind a turn."""


@dataclass
class Turn:
    """Characters of a turn of the assistant."""

    start: int
    """What a model that is given all before goes on with."""

    said: int
    """Behind the answer, where what ends the turn begins."""

    end: int
    """Behind what ends it."""

    learnt: Sequence[tuple[int, int]] = ()
    """What of it the template marks as generated, or all of it where it marks nothing at all."""

    def says(self, whole: str) -> bool:
        """Whether there is more of it than its end, in what the template has written."""
        return bool(whole[self.start : self.said].strip())


class Turns:
    """Finds the turns of the assistant in what a template has written.

    Args:
        rendering: the template.
    """

    def __init__(self, rendering: Rendering) -> None:
        self.rendering = rendering
        ends = "|".join(re.escape(end) for end in rendering.ends)
        self._ends = re.compile(ends or "(?!)")
        self._soon = re.compile(rf"\s*(?:{ends})" if ends else re.escape(rendering.tail))

    def find(self, written: Written) -> list[Turn]:
        """The turns of the assistant in a conversation, in order.

        Raises:
            SampleError: the template writes a turn so that it cannot be told where it stands.
        """
        whole = written.whole
        spoken = [index for index, message in enumerate(written.messages) if message["role"] == "assistant"]
        marks = self._marks(written)
        turns = []
        for number, index in enumerate(spoken):
            try:
                turns.append(self._turn(written, index))
            except SampleError:
                if marks is None or len(marks) != len(spoken):
                    raise
                turns.append(self._of_mark(whole, marks[number]))
        for turn, following in pairwise(turns):
            if turn.end > following.start:
                raise _unclear("two turns of the assistant stand in one another")
        for turn in turns:
            turn.learnt = [(turn.start, turn.end)] if marks is None else self._within(whole, turn, marks)
        return turns

    # ----------------------------------------------------------------------------------------------------------------
    # What the template marks

    def _marks(self, written: Written) -> list[tuple[int, int]] | None:
        """What it marks; None without marks, or where it looks at what is in between."""
        text = self.rendering.marked(written.messages, written.tools)
        return None if text is None else marked_ranges(text, written.whole)

    def _of_mark(self, whole: str, mark: tuple[int, int]) -> Turn:
        """A turn of which nothing is known but its mark."""
        start, behind = mark
        ends = [*self._ends.finditer(whole, start, behind)]
        found = ends[-1] if ends else self._soon.match(whole, behind)
        return Turn(start, found.start(), found.end()) if found else Turn(start, behind, behind)

    @staticmethod
    def _within(whole: str, turn: Turn, marks: list[tuple[int, int]]) -> list[tuple[int, int]]:
        """What of a turn is marked; where the last mark stands around the content alone, up to the end of the turn."""
        own = [(max(start, turn.start), min(end, turn.end)) for start, end in marks]
        own = [(start, end) for start, end in own if start < end]
        if own and not whole[own[-1][1] : turn.said].strip():
            own[-1] = (own[-1][0], turn.end)
        return own

    # ----------------------------------------------------------------------------------------------------------------
    # What it writes step by step

    def _turn(self, written: Written, index: int) -> Turn:
        whole, message, rendering = written.whole, written.messages[index], self.rendering
        start = self._start(written, index)
        calls = message.get("tool_calls")
        if start is not None:
            said = None if calls else self._behind(whole, start, content_text(message))
        else:
            begins, said = self._around(written, index)
            start = begins - len(rendering.before) if whole[:begins].endswith(rendering.before) else begins
            if calls:
                raise _unclear("it writes a call of a tool anew when the conversation goes on")
        if said is not None:
            found = self._soon.match(whole, said)
            if found:
                return Turn(start, said, found.end())
            if not rendering.ends:
                return Turn(start, said, said)
        stop = self._stop(written, index)
        if not rendering.ends:
            end = start + len(whole[start:stop].rstrip())
            return Turn(start, end, end)
        ends = [*self._ends.finditer(whole, start, stop)]
        if not ends:
            raise _unclear("it ends a turn of the assistant with none of its tokens for that")
        if not _is_whole(whole[start : ends[-1].start()], content_text(message)):
            raise SampleError("the chat template leaves out a part of what the assistant says.")
        return Turn(start, ends[-1].start(), ends[-1].end())

    def _start(self, written: Written, index: int) -> int | None:
        """Where a turn begins, if what stands before it is what the template writes of the messages before."""
        prompt = written.prompt(index)
        if prompt is None:
            return None
        if written.whole.startswith(prompt):
            return len(prompt)
        # A prompt may hold what is left out when the conversation goes on, such as an empty thought.
        head = self.rendering.assistant_head
        before = self.rendering.text(written.messages[:index], written.tools) + head if head else ""
        return len(before) if before and written.whole.startswith(before) else None

    def _behind(self, whole: str, start: int, content: str) -> int | None:
        """Behind an answer that stands where it must, perhaps without the white space around it."""
        for text in dict.fromkeys((content, content.strip())):
            for before in ("", self.rendering.before):
                if text and whole.startswith(before + text, start):
                    return start + len(before) + len(text)
        return None

    def _around(self, written: Written, index: int) -> tuple[int, int]:
        """Where an answer stands, found by marks around it."""
        content = content_text(written.messages[index])
        core = content.strip()
        if core:
            before, behind = content[: content.find(core)], content[content.find(core) + len(core) :]
            other = self._replaced(written.messages, index, f"{before}{OPEN}{core}{CLOSE}{behind}")
            found = marked_ranges(self.rendering.text(other, written.tools), written.whole)
            if found and len(found) == 1:
                return found[0]
        raise _unclear("it writes earlier turns anew when the conversation goes on")

    def _stop(self, written: Written, index: int) -> int:
        """Where the message behind a turn begins, at the latest."""
        whole, messages, tools = written.whole, written.messages, written.tools
        if index + 1 == len(messages):
            return len(whole)
        following = {**messages[index + 1], "content": messages[index + 1].get("content", "")}
        shorter = self._replaced([*messages[: index + 1], following], index + 1, SPOT)
        text = self.rendering.text(shorter, tools).rpartition(SPOT)[0]
        if text and whole.startswith(text):
            return len(text)
        text = self.rendering.text(messages[: index + 1], tools)
        if whole.startswith(text):
            return len(text)
        raise _unclear("it writes earlier turns anew when the conversation goes on")

    @staticmethod
    def _replaced(messages: list[Message], index: int, text: str) -> list[Message]:
        """The conversation with another content of one message, in the form that it had."""
        content = [{"type": "text", "text": text}] if isinstance(messages[index].get("content"), list) else text
        return [*messages[:index], {**messages[index], "content": content}, *messages[index + 1 :]]


def _is_whole(written: str, content: str) -> bool:
    """Whether an answer is there, perhaps without a thought before it, or with the thought in another form."""
    written, content = written.strip(), content.strip()
    return content.rpartition("</think>")[2].strip() in written


def _unclear(reason: str) -> SampleError:
    return SampleError(f"the chat template leaves it unclear what the assistant has said: {reason}.")
