"""Chat templates as Jinja texts: those of this package by name, format strings, files."""

import ast
import json
import re
import string
from collections.abc import Mapping, Set
from contextlib import suppress
from datetime import date
from pathlib import Path
from typing import Any

import jinja2
from jinja2 import meta
from transformers import PreTrainedTokenizerBase

from akl_lightning.errors import UsageError

CHAT = "chat"
"""Stands for the tokenizer's own chat template."""

ALPACA = (
    "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Response:\n"
)
ALPACA_WITH_INPUT = (
    "Below is an instruction that describes a task, paired with an input that provides further context. Write a "
    "response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Input:\n{input}\n\n### Response:\n"
)

TEMPLATES = {
    "plain": ("{instruction}\n", "{instruction}\n{input}\n"),
    "alpaca": (ALPACA, ALPACA_WITH_INPUT),
}
"""Format strings by name: without and with an input. Alpaca's is the one of Stanford Alpaca and MiniLLM."""

CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' ~ message['role'] ~ '\n' ~ message['content'] }}"
    "{{ END if message['role'] == 'assistant' else '<|im_end|>' }}{{ '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)

PINNED = date(2024, 7, 26)
"""What a template that writes today's date is given for it: the day that Llama 3's falls back to."""

OPEN, CLOSE = "\ufdd0", "\ufdd1"
"""Stand around what a template marks as generated, or what is to be found again in what it writes.

Unicode keeps these two out of all text.
"""

_MARK = re.compile(r"(\{%[-+]?\s*)(end)?generation(\s*[-+]?%\})")
_STRFTIME = re.compile(r"strftime_now\(\s*(\"[^\"]*\"|'[^']*')\s*\)")


def template_text(template: str, tokenizer: PreTrainedTokenizerBase, with_tools: bool = False) -> str:
    """The Jinja text of a template, with today's date pinned.

    Args:
        template: ``chat`` for the tokenizer's own, ``chatml``, ``plain``, ``alpaca``, a Jinja text, the path of a file
            with one, or a format string with ``{instruction}`` and perhaps ``{input}``.
        tokenizer: whose chat template, and which tokens there are.
        with_tools: take the one for tools, where the tokenizer has several.

    Raises:
        UsageError: none of these, a file that cannot be read, or a tokenizer without the one that is asked for.
    """
    if template == CHAT:
        if not tokenizer.chat_template:
            raise UsageError("the tokenizer has no chat template: use the template plain or alpaca, or another one.")
        try:
            return _pin_date(tokenizer.get_chat_template(tools=[{}] if with_tools else None))
        except ValueError as error:
            raise UsageError(
                f"the tokenizer has the chat templates {', '.join(tokenizer.chat_template)} and none called default: "
                "write the one to use into a file and give its path as data.template."
            ) from error
    if template == "chatml":
        # Where it is no token but letters, no model could be told to stop there.
        is_token = "<|im_end|>" in tokenizer.get_vocab()
        return CHATML.replace("END", "'<|im_end|>'" if is_token else "eos_token")
    if template in TEMPLATES:
        return _from_format(*TEMPLATES[template])
    if is_format(template):
        return _from_format(template, template)
    if "{%" in template or "{{" in template:
        return _pin_date(template)
    path = Path(template)
    if "\n" not in template and len(template) < 1000 and path.suffix in (".jinja", ".jinja2", ".j2", ".txt"):
        try:
            return _pin_date(path.read_text(encoding="utf-8"))
        except (OSError, UnicodeDecodeError) as error:
            raise UsageError(
                f"cannot read the template {template!r} ({error}): give the path of a Jinja file."
            ) from error
    raise UsageError(
        f"unknown prompt template {template!r}: use {CHAT}, chatml, {', '.join(TEMPLATES)}, a Jinja text, the path of "
        "a .jinja file, or a text with {instruction} and {input} in it."
    )


def is_format(template: str) -> bool:
    """Whether it is a format string with ``{instruction}`` and perhaps ``{input}``.

    >>> is_format("{instruction}: {input}"), is_format("{{ messages }}"), is_format("{instruction!r}")
    (True, False, False)
    """
    try:
        parsed = list(string.Formatter().parse(template))
    except ValueError:
        return False
    fields = {field for _, field, _, _ in parsed if field is not None}
    bare = not any(conversion or spec for _, field, spec, conversion in parsed if field is not None)
    return bare and "{%" not in template and "instruction" in fields and not fields - {"instruction", "input"}


def variables(text: str) -> Set[str]:
    """Names that a template reads and does not set itself: the arguments it can be given.

    >>> sorted(variables("{% for m in messages %}{{ m.content if thinking else bos_token }}{% endfor %}"))
    ['bos_token', 'messages', 'thinking']

    Raises:
        jinja2.TemplateSyntaxError: the text is no Jinja.
    """
    environment = jinja2.Environment(extensions=["jinja2.ext.loopcontrols"])
    return meta.find_undeclared_variables(environment.parse(_MARK.sub("", text)))


def with_marks(text: str) -> str | None:
    """The template with :data:`OPEN` and :data:`CLOSE` around what it marks as generated, or None without such marks.

    A block of Jinja takes the place of another, so that white space is trimmed around it as before.
    """
    if not _MARK.search(text):
        return None
    head = f"{{% macro marked_as_generated() %}}{OPEN}{{{{ caller() }}}}{CLOSE}{{% endmacro %}}\n"
    return head + _MARK.sub(lambda tag: tag[1] + ("endcall" if tag[2] else "call marked_as_generated()") + tag[3], text)


def with_defaults(text: str, arguments: Mapping[str, Any]) -> str:
    """The template with arguments that hold unless others are given; each :func:`is_plain`.

    >>> with_defaults("{{ messages }}", {"enable_thinking": False})
    '{% set enable_thinking = enable_thinking|default(False) %}\\n{{ messages }}'
    """
    head = "".join(f"{{% set {name} = {name}|default({value!a}) %}}" for name, value in arguments.items())
    # The end of the line is no part of what is written.
    return f"{head}\n{text}" if head else text


def is_plain(value: Any) -> bool:
    """Whether it can be written into a template: texts, numbers, booleans, None, and lists and mappings of these.

    >>> is_plain({"levels": [1, 0.5, "é", None]}), is_plain(PINNED)
    (True, False)
    """
    with suppress(ValueError, SyntaxError, TypeError):
        json.dumps(value)  # not of sets, bytes or complex numbers, which Python can read again and Jinja cannot
        return bool(ast.literal_eval(ascii(value)) == value)
    return False


def marked_ranges(text: str, whole: str) -> list[tuple[int, int]] | None:
    """Where in a text something stands that has marks around it in another one; None where they differ in more.

    Args:
        text: with :data:`OPEN` and :data:`CLOSE`.
        whole: without.

    >>> marked_ranges(f"a{OPEN}bc{CLOSE}d{OPEN}e{CLOSE}", "abcde")
    [(1, 3), (4, 5)]
    """
    if text.replace(OPEN, "").replace(CLOSE, "") != whole:
        return None
    found = enumerate(re.finditer(f"{OPEN}([^{CLOSE}]*){CLOSE}", text))
    return [(match.start() - 2 * number, match.end() - 2 * number - 2) for number, match in found]


def pinned_dates(text: str) -> dict[str, str]:
    """What stands for today's date in a template, under the format in which it is asked for."""
    return {literal[1:-1]: PINNED.strftime(literal[1:-1]) for literal in sorted(set(_STRFTIME.findall(text)))}


def _pin_date(text: str) -> str:
    """Let a template that writes today's date write :data:`PINNED`, today and tomorrow."""
    if "strftime_now" not in text:
        return text
    written = f"{{{{ {pinned_dates(text)!a}.get(format, {PINNED.isoformat()!a}) }}}}"
    return f"{{% macro strftime_now(format) %}}{written}{{% endmacro %}}\n{text}"


def _from_format(without_input: str, with_input: str) -> str:
    """Jinja that writes a user's message as a format string does, and the end of text after an assistant's."""
    return (
        "{% for message in messages %}{% set role = message['role'] %}"
        "{% if role == 'user' and 'input' in message and message['input'] %}"
        + _expression(with_input)
        + "{% elif role == 'user' %}"
        + _expression(without_input)
        + "{% elif role == 'assistant' %}{{ message['content'] ~ eos_token }}"
        "{% elif role in ('system', 'tool') %}{{ message['content'] ~ '\n' }}"
        "{% else %}{{ raise_exception('the role ' ~ role ~ ' is none of system, user, assistant and tool') }}"
        "{% endif %}{% endfor %}"
    )


def _expression(template: str) -> str:
    names = {"instruction": "message['content']", "input": "message['input']|default('')", None: "''"}
    parts = [part for text, field, _, _ in string.Formatter().parse(template) for part in (ascii(text), names[field])]
    return "{{ " + " ~ ".join(parts) + " }}"
