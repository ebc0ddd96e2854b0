"""Templates that write one message after another, so that one rendering tells every prompt of a conversation."""

from collections.abc import Mapping, Sequence
from functools import cache
from typing import Any

import jinja2
from jinja2 import meta, nodes

from akl_lightning.compat import compiled_chat_template
from akl_lightning.data.templates import BEHIND_MESSAGE

_PLAIN = (nodes.Template, nodes.Output, nodes.If, nodes.For, nodes.Assign, nodes.Expr, nodes.Helper)
_THOUGHTS = {"reasoning_content", "reasoning", "thinking"}
_KNOWN_OF_LOOP = ("first", "index", "index0")


class InTurn:
    """A template that writes one message after another.

    Args:
        messages: writes them, with :data:`~akl_lightning.data.templates.BEHIND_MESSAGE` behind each.
        asks: writes what asks for an answer.
    """

    def __init__(self, messages: jinja2.Template, asks: jinja2.Template) -> None:
        self.messages = messages
        self.asks = asks

    def pieces(
        self, messages: Sequence[Mapping[str, Any]], tools: Any, variables: Mapping[str, Any]
    ) -> tuple[list[str], str] | None:
        """What is written of each message, and what asks for an answer; None where that cannot be told for sure."""
        # What apply_chat_template gives other names, or leaves out.
        if any(None in message.values() or _THOUGHTS & set(message) for message in messages):
            return None
        given = {**variables, "messages": messages, "tools": tools, "documents": None}  # as apply_chat_template does
        try:
            written, asked = self.messages.render(given), self.asks.render(given)
        except (jinja2.TemplateError, TypeError, ValueError, KeyError, AttributeError, ZeroDivisionError):
            return None
        *pieces, behind = written.split(BEHIND_MESSAGE)
        return (pieces, asked) if len(pieces) == len(messages) and not behind else None


@cache
def in_turn(text: str) -> InTurn | None:
    """A template that writes one message after another; None for all others.

    Its text alone must show that what it writes up to a message depends on nothing behind it, and what it asks for an
    answer with on no message at all: it is one loop over all messages, which looks at the first and at the one whose
    turn it is, and behind it there is nothing but what ``add_generation_prompt`` asks for.
    """
    environment = compiled_chat_template(text).environment
    tree = environment.parse(text)
    loops = [node for node in tree.body if isinstance(node, nodes.For)]
    if len(loops) != 1 or not all(isinstance(node, _PLAIN) for node in tree.find_all(nodes.Node)):
        return None
    loop, place = loops[0], tree.body.index(loops[0])
    before, behind = tree.body[:place], tree.body[place + 1 :]
    over_all = _is_name(loop.iter, "messages") and isinstance(loop.target, nodes.Name) and loop.test is None
    first = [node for node in tree.find_all(nodes.Getitem) if isinstance(node.arg, nodes.Const) and node.arg.value == 0]
    known = [node for node in tree.find_all(nodes.Getattr) if node.attr in _KNOWN_OF_LOOP]
    uses = {
        "messages": 1 + sum(_is_name(node.node, "messages") for node in first),
        "loop": sum(_is_name(node.node, "loop") for node in known),
        "add_generation_prompt": len(behind),
        "namespace": 0,  # it would carry what a message says to what stands behind them all
    }
    asked = [
        node.body for node in behind if isinstance(node, nodes.If) and _is_name(node.test, "add_generation_prompt")
    ]
    otherwise = [node for node in (loop, *behind) if getattr(node, "else_", None) or getattr(node, "elif_", None)]
    names = [node.name for node in tree.find_all(nodes.Name)]
    if not over_all or loop.recursive or otherwise or len(asked) != len(behind):
        return None
    if any(names.count(name) != count for name, count in uses.items()):
        return None
    set_before = {name.name for node in before for name in node.find_all(nodes.Name) if name.ctx == "store"}
    asks = nodes.Template([node for body in asked for node in body], lineno=1)
    asks.set_environment(environment)
    if meta.find_undeclared_variables(asks) & {"messages", "tools", *set_before}:
        return None
    loop.body.append(nodes.Output([nodes.TemplateData(BEHIND_MESSAGE)], lineno=loop.lineno))
    tree.set_environment(environment)
    return InTurn(environment.from_string(tree), environment.from_string(asks))


def _is_name(node: Any, name: str) -> bool:
    return isinstance(node, nodes.Name) and node.name == name
