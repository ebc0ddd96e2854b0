"""How an instruction and its input become a prompt."""

import hashlib
import json
import string

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

from akl_lightning.errors import UsageError

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
"""Templates by name: without and with an input. Alpaca's is the one of Stanford Alpaca and MiniLLM."""

CHAT = "chat"
"""Stands for the tokenizer's own chat template."""


def render(template: str, instruction: str, input: str = "") -> str:
    """Write the prompt of an instruction.

    Args:
        template: a name in :data:`TEMPLATES`, or a format string with ``{instruction}`` and perhaps ``{input}``.
        instruction: what to do.
        input: what to do it to; may be empty.

    Raises:
        UsageError: neither a known name nor a format string with these two fields.

    >>> render("plain", "Add.", "1 2")
    'Add.\\n1 2\\n'
    """
    without_input, with_input = TEMPLATES.get(template, (template, template))
    try:
        fields = {field for _, field, _, _ in string.Formatter().parse(without_input) if field is not None}
    except ValueError:
        fields = set()
    if "instruction" not in fields or fields - {"instruction", "input"}:
        raise UsageError(
            f"unknown prompt template {template!r}: use {', '.join(TEMPLATES)}, {CHAT}, or a text with {{instruction}} "
            "and {input} in it."
        )
    return (with_input if input else without_input).format(instruction=instruction, input=input)


def render_chat(tokenizer: PreTrainedTokenizerBase, task: str) -> str:
    """Write a prompt as the tokenizer's own chat template does, up to where the answer begins.

    Raises:
        UsageError: the template is broken, or takes no such conversation.
    """
    try:
        chat = [{"role": "user", "content": task}]
        return str(tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True))
    except (TemplateError, TypeError, ValueError, KeyError) as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise UsageError(
            f"the tokenizer's chat template fails on the prompt {task[:40]!r} ({reason}): mend it, or use the template "
            "plain or alpaca, or another one."
        ) from error


def template_digest(template: str, tokenizer: PreTrainedTokenizerBase) -> str:
    """SHA-256 of the prompts that a template gives, whatever it is called."""
    if template == CHAT:
        prompts = str(tokenizer.chat_template)
    else:
        prompts = json.dumps([render(template, "{instruction}"), render(template, "{instruction}", "{input}")])
    return hashlib.sha256(prompts.encode()).hexdigest()
