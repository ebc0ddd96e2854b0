"""What a record is, whatever form it came in: a conversation or a document, as a row of Arrow columns."""

import hashlib
import json
from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # a third of a second, which a command line does not wait for
    import datasets

Message = dict[str, Any]
"""``role`` (system, user, assistant or tool) and ``content`` (a text, a list of parts, or None beside ``tool_calls``),
with whatever else the form had: ``tool_calls``, ``tool_call_id``, ``name``, ``reasoning_content``. ``learn`` is False
on an assistant's message that is not to be learnt. The ``input`` of an instruction is a key of its user's message."""

Row = dict[str, Any]
"""A value for each of :data:`~akl_lightning.data.store.RECORD_FEATURES`."""

_CONTENT = ("messages", "tools", "text", "references", "cut", "name")
"""The columns by which records are equal."""


class Source(ABC):
    """Gives records."""

    @abstractmethod
    def load(self) -> "dict[str, datasets.Dataset]":
        """Records under ``train``, and under ``validation`` and ``test`` where the source knows these splits.

        A test set has its records under ``test`` alone. The columns are those of
        :data:`~akl_lightning.data.store.RECORD_FEATURES`.
        """

    @property
    def description(self) -> str:
        """What they are, in a few words, for model cards."""
        return type(self).__name__


def conversation(
    messages: Sequence[Message],
    form: str,
    file: str,
    line: int,
    tools: Sequence[Any] = (),
    references: Sequence[str] = (),
    cut: bool = False,
    name: str = "",
) -> Row:
    """The row of a conversation.

    Raises:
        UnicodeEncodeError: a text holds half of a surrogate pair.
        TypeError: something that JSON cannot hold.
    """
    parts = [_json(message) for message in messages]
    written = f"[{','.join(parts)}]"
    described = _json(tools) if tools else ""
    for text in (written, described, name, *references):
        text.encode()  # what Arrow would stumble over thousands of rows later
    return {
        "messages": written,
        "tools": described,
        "text": "",
        "references": list(references) if len(references) > 1 else [],
        "cut": cut,
        "form": form,
        "file": file,
        "line": line,
        "name": name,
        "key": _first_bytes(name or _prompt(messages, parts, described)),
    }


def document(text: str, file: str, line: int) -> Row:
    """The row of a document, of which every token counts.

    Raises:
        UnicodeEncodeError: the text holds half of a surrogate pair.
    """
    empty = {"messages": "", "tools": "", "references": [], "cut": False, "name": ""}
    return {**empty, "text": text, "form": "text", "file": file, "line": line, "key": _first_bytes(text)}


def content_text(message: Message) -> str:
    """What a message says, be it a text, a list of parts or nothing.

    >>> content_text({"content": [{"type": "text", "text": "Good "}, {"type": "text", "text": "day"}]})
    'Good day'
    """
    content = message.get("content")
    if isinstance(content, list):
        return "".join(str(part.get("text", "")) for part in content)
    return "" if content is None else str(content)


def _prompt(messages: Sequence[Message], written: Sequence[str], tools: str) -> str:
    """What the last answer answers, as one text.

    For an instruction alone it is what earlier versions hashed, so that their samples stay in their splits.
    """
    last = max((index for index, message in enumerate(messages) if message["role"] == "assistant"), default=None)
    before = messages if last is None else messages[:last]
    if len(before) == 1 and before[0]["role"] == "user" and isinstance(before[0]["content"], str) and not tools:
        return f"{before[0]['content']}\0{before[0].get('input', '')}"
    return "\0".join([*written[: len(before)], tools])


def _first_bytes(text: str) -> int:
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big")


_json = json.JSONEncoder(ensure_ascii=False, separators=(",", ":")).encode


def row_digest(row: Row) -> bytes:
    """A digest of what a record says, wherever it stands."""
    return _digest(row[column] for column in _CONTENT)


def _digest(values: Iterable[Any]) -> bytes:
    return hashlib.blake2b("\0".join(map(str, values)).encode(), digest_size=16).digest()


def row_digests(records: "datasets.Dataset") -> Iterable[bytes]:
    """:func:`row_digest` of each."""
    for batch in records.select_columns(list(_CONTENT)).with_format(None).iter(1000):
        for values in zip(*(batch[column] for column in _CONTENT), strict=True):
            yield _digest(values)


def content_digest(*records: "datasets.Dataset") -> str:
    """SHA-256 of what records say, in their order."""
    whole = hashlib.sha256()
    for part in records:
        for digest in row_digests(part):
            whole.update(digest)
        whole.update(b"\0")
    return whole.hexdigest()
