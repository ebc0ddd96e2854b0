"""Messages as records hold them, made such as a chat template expects them."""

import json
import re
from typing import Any

from akl_lightning.data.records import Message, content_text
from akl_lightning.data.rendering import Rendering, SampleError, Written
from akl_lightning.data.templates import CLOSE, OPEN, marked_ranges


def is_learnt(message: Message) -> bool:
    """Whether there is something in it to learn, and nobody says that it is not to be."""
    says = content_text(message).strip() or message.get("tool_calls") or message.get("reasoning_content")
    return bool(says) and message.get("learn") is not False


def for_template(message: Message, rendering: Rendering, knows_input: bool) -> Message:
    """A message as a template expects it: texts or parts, arguments of tools as mappings, without what is null.

    Args:
        message: as a record holds it.
        rendering: the template.
        knows_input: whether it has a place of its own for the input of an instruction.

    Raises:
        SampleError: it holds what the template cannot write.
    """
    message = {key: value for key, value in message.items() if value not in (None, []) and key != "learn"}
    content = message.get("content")
    if isinstance(content, list):
        others = [part.get("type") for part in content if not isinstance(part.get("text"), str)]
        if others:
            raise SampleError(f"a content has a part of type {others[0]!r}, and only texts can be learnt from.")
        if not rendering.takes_parts:
            message["content"] = content_text(message)
    if "input" in message and not knows_input:
        message["content"] = "\n".join(text for text in (content_text(message), str(message.pop("input"))) if text)
    if rendering.parts and isinstance(message.get("content"), str):
        message["content"] = [{"type": "text", "text": message["content"]}]
    if message.get("tool_calls"):
        if not rendering.writes_tool_calls:
            raise SampleError("the chat template does not write calls of tools: use another one.")
        message["tool_calls"] = [_with_arguments(call) for call in message["tool_calls"]]
    return message


def thought_of(message: Message) -> str:
    """What the assistant thinks before it answers, as a field of its own or within the content.

    >>> thought_of({"content": "<think>two and two</think>4"})
    'two and two'
    """
    before, mark, _ = content_text(message).partition("</think>")
    inside = before.rpartition("<think>")[2] if mark else ""
    return str(message.get("reasoning_content") or inside).strip()


def _with_arguments(call: dict[str, Any]) -> dict[str, Any]:
    """A call of a tool with its arguments as a mapping, as templates expect it; in many data they are JSON texts."""
    function = call.get("function", call)
    arguments = function.get("arguments")
    if isinstance(arguments, str):
        try:
            arguments = json.loads(arguments)
        except ValueError:  # a template may write it as it is
            return call
        function = {**function, "arguments": arguments}
    return {**call, "function": function} if "function" in call else function


def literal_ranges(pattern: re.Pattern[str], written: Written) -> list[tuple[int, int]]:
    """Where something that somebody says looks like a special token.

    Args:
        pattern: of special tokens.
        written: a conversation.

    Raises:
        SampleError: the template makes something else of such a text.
    """
    said = [written.messages, written.tools]
    marked = _marked(pattern, said)
    if marked == said:
        return []
    messages, tools = marked
    found = marked_ranges(written.rendering.text(messages, tools, written.asks), written.whole)
    if found is None:
        raise SampleError("the chat template takes apart what looks like a special token in a content: reword it.")
    return found


def _marked(pattern: re.Pattern[str], said: Any) -> Any:
    if isinstance(said, str):
        return pattern.sub(rf"{OPEN}\g<0>{CLOSE}", said)
    if isinstance(said, dict):
        return {key: _marked(pattern, inner) for key, inner in said.items()}
    return [_marked(pattern, inner) for inner in said] if isinstance(said, list) else said
