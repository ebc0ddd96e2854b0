"""Conversations as a chat template writes them, and what a template is found to do when it is tried."""

from collections.abc import Mapping
from typing import Any

import jinja2
from transformers import PreTrainedTokenizerBase

from akl_lightning.compat import compiled_chat_template
from akl_lightning.data.records import Message, content_text
from akl_lightning.data.templates import CHAT, is_plain, pinned_dates, template_text, variables, with_marks
from akl_lightning.data.tokens import any_of
from akl_lightning.errors import UsageError

USER, ASSISTANT = "Whereupon?", "Thereupon."
"""Texts that no template has in it, and which it leaves as they are: one word with a stop, a capital first."""

THOUGHTS = ("reasoning_content", "thinking", "reasoning")
"""What messages call what the assistant thinks before it answers; in this order ``apply_chat_template`` looks."""

GIVEN_BY_US = {
    *("messages", "tools", "documents", "add_generation_prompt", "raise_exception", "strftime_now", "namespace"),
    *("dict", "range", "cycler", "joiner", "lipsum", "loop"),
    *(f"{name}_token" for name in ("bos", "eos", "pad", "unk", "sep", "cls", "mask")),
}
"""What a template can read without being told by the user."""


class SampleError(UsageError):
    """One record that a template cannot write, or in which the learnt tokens cannot be told for sure."""


class Rendering:
    """A chat template of a tokenizer, tried once on a conversation of our own.

    Args:
        tokenizer: the tokenizer; its special tokens are known to the template.
        template: as :func:`~akl_lightning.data.templates.template_text` takes it; None for the tokenizer's own, or
            ``plain`` where it has none.
        arguments: further variables of the template.

    Raises:
        UsageError: the template fails on a question and an answer, leaves one out, or does not use an argument; or an
            argument is none that it could have as a default.
    """

    parts: bool
    """Whether the template wants a content as a list of parts."""

    takes_parts: bool
    """Whether it can take one, or a text as well."""

    ends: tuple[str, ...]
    """Tokens that end a turn of the assistant, most usual first."""

    tail: str
    """What stands behind an answer, without the white space at its end, where no token ends a turn."""

    before: str
    """What the assistant itself writes before its answer, such as an empty thought."""

    user_head: str
    """What stands before what the user says."""

    writes_date: bool
    """Whether it writes today's date."""

    asks_otherwise: str
    """How the prompt for an answer ends, where answers do not stand behind it; else empty."""

    assistant_head: str
    """What stands before what the assistant says, in an earlier turn."""

    system: str
    """What the template writes before the first question by itself."""

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        template: str | None = None,
        arguments: Mapping[str, Any] | None = None,
    ) -> None:
        self.tokenizer = tokenizer
        if template is None:
            template = CHAT if tokenizer.chat_template else "plain"
        self.template = template
        self.arguments = dict(arguments or {})
        self._text = template_text(template, tokenizer)
        self._text_for_tools = template_text(template, tokenizer, with_tools=True)
        self._check_arguments()
        self._marked = with_marks(self._text), with_marks(self._text_for_tools)
        self._variables = {**tokenizer.special_tokens_map, **self.arguments}
        self.writes_tool_calls = "tool_calls" in self._text_for_tools
        self.writes_tools = "tools" in variables(self._text_for_tools)
        self._try()

    @property
    def texts(self) -> tuple[str, str]:
        """The Jinja text of the template, and of the one for tools."""
        return self._text, self._text_for_tools

    def text(self, messages: list[Message], tools: list[Any] | None = None, prompt: bool = False) -> str:
        """Write a conversation.

        Args:
            messages: the conversation, at least one message.
            tools: descriptions of tools.
            prompt: write the beginning of an answer as well, which the assistant is to go on from.

        Raises:
            SampleError: the template fails, with its own reason.
        """
        return self._render(self._text_for_tools if tools else self._text, messages, tools, prompt)

    def marked(self, messages: list[Message], tools: list[Any] | None = None) -> str | None:
        """The same with marks around what the template says is generated, or None where it says nothing."""
        text = self._marked[bool(tools)]
        return None if text is None else self._render(text, messages, tools, False)

    def _render(self, template: str, messages: list[Message], tools: list[Any] | None, prompt: bool) -> str:
        # As apply_chat_template does it, but for its copies of all messages, a seventh of the time to encode them.
        compiled = compiled_chat_template(template)
        said = [_with_thought(message) for message in messages]
        given = {**self._variables, "tools": tools, "documents": None, "add_generation_prompt": prompt}
        try:
            try:
                return compiled.render(given, messages=said)
            except (jinja2.TemplateError, TypeError):
                # Beside calls of tools there is often no content, which many a template does not expect.
                if all("content" in message for message in said):
                    raise
                return compiled.render(given, messages=[{"content": "", **message} for message in said])
        except (jinja2.TemplateError, TypeError, ValueError, KeyError, AttributeError, ZeroDivisionError) as error:
            reason = " ".join(str(error).split()) or type(error).__name__
            asked = next((content_text(message) for message in messages if message.get("role") == "user"), "")
            whose = "the tokenizer's chat template" if self.template == CHAT else "the chat template"
            raise SampleError(
                f"{whose} fails on the prompt {asked[:40]!r} ({reason}): mend it, or use the template plain or alpaca, "
                "or another one."
            ) from error

    # ----------------------------------------------------------------------------------------------------------------
    # What it does

    def _check_arguments(self) -> None:
        try:
            known = (variables(self._text) | variables(self._text_for_tools)) - GIVEN_BY_US
        except jinja2.TemplateError as error:
            raise UsageError(
                f"the chat template is no Jinja ({' '.join(str(error).split()).rstrip('.')}): mend it, or use the "
                "template plain or alpaca, or another one."
            ) from error
        for name, value in self.arguments.items():
            if not is_plain(value):
                raise UsageError(
                    f"data.template_arguments has {name} = {value!r}, which cannot be written into a template: give "
                    "a text, a number, a boolean, or a list or mapping of these."
                )
            if name not in known:
                raise UsageError(
                    f"data.template_arguments has {name!r}, which the chat template does not use: it knows "
                    f"{', '.join(sorted(known)) or 'none'}."
                )

    def _try(self) -> None:
        for self.parts in (False, True):
            user, assistant = self._say("user", USER), self._say("assistant", ASSISTANT)
            try:
                prompt = self.text([user], prompt=True)
            except SampleError:
                if not self.parts:
                    raise
                prompt = ""
            if USER in prompt:
                break
        whole = self.text([user, assistant]) if USER in prompt else ""
        for text, who in ((USER, "user"), (ASSISTANT, "assistant")):
            if text not in whole:
                raise UsageError(
                    f"the chat template leaves out what the {who} says: mend it, or use the template plain or alpaca, "
                    "or another one."
                )
        self._try_turns(user, assistant, whole)
        goes_on = whole.startswith(prompt)
        self.asks_otherwise = "" if goes_on else prompt[-40:]
        self.before = whole.removeprefix(prompt).partition(ASSISTANT)[0] if goes_on else ""
        self.system = prompt.partition(USER)[0].removesuffix(self.user_head).strip() if self.user_head else ""
        bos = self.tokenizer.bos_token or ""
        if not self.user_head.startswith(bos):  # with which some begin every turn
            self.system = self.system.removeprefix(bos).strip()
        self.writes_date = any(written in prompt for written in pinned_dates(self._text).values())
        self.takes_parts = self.parts or self._takes_parts()

    def _try_turns(self, user: Message, assistant: Message, whole: str) -> None:
        """Find out what stands before and behind what is said."""
        try:
            asked, two = self.text([user]), self.text([user, assistant, user, assistant])
            between = two.split(ASSISTANT)[1].split(USER)[0]
            self.assistant_head = two[len(asked) :].split(ASSISTANT)[0] if two.startswith(asked) else ""
        except (SampleError, IndexError):  # for one question only
            asked = between = self.assistant_head = ""
        tail = whole.rpartition(ASSISTANT)[2]
        end, inner = self._end(tail), self._end(between)
        # Of two ends, the one of an earlier turn is what the user's message ends with as well; else it begins the next.
        if inner != end and inner != self._end(asked.partition(USER)[2]):
            inner = ""
        call = self._end_of_call(user) if end else ""
        self.ends = tuple(dict.fromkeys(token for token in (end, inner, call) if token))
        self.tail = "" if self.ends else tail.rstrip()
        self.user_head = (between.partition(inner)[2] if inner else between.removeprefix(self.tail)).lstrip()

    def _say(self, role: str, text: str) -> Message:
        return {"role": role, "content": [{"type": "text", "text": text}] if self.parts else text}

    def _takes_parts(self) -> bool:
        try:
            written = self.text([{"role": "user", "content": [{"type": "text", "text": USER}]}])
        except SampleError:
            return False
        return USER in written and "'type'" not in written and '"type"' not in written

    def _end(self, text: str) -> str:
        """The token that ends a turn, in what stands behind an answer."""
        added = {token.content: token.special for token in self.tokenizer.added_tokens_decoder.values()}
        for names in ([name for name, special in added.items() if special], list(added)):
            names = [name for name in names if not name.isspace()]
            if names and (found := any_of(names).search(text)):
                return found[0]
        return ""

    def _end_of_call(self, user: Message) -> str:
        """The same behind a call of a tool, which often has tokens of its own."""
        call = {"name": "look_up", "arguments": {"word": ASSISTANT}}
        message = {"role": "assistant", "tool_calls": [{"id": "abcdefghi", "type": "function", "function": call}]}
        if not self.writes_tool_calls:
            return ""
        try:
            tail = self.text([user, message]).rpartition(ASSISTANT)[2]
        except SampleError:
            return ""
        special = [token.content for token in self.tokenizer.added_tokens_decoder.values() if token.special]
        found = any_of(special).findall(tail)
        return found[-1] if found else ""


class Written:
    """A conversation as a template writes it, and the prompts in it.

    Args:
        rendering: the template.
        messages: the conversation.
        tools: descriptions of tools.
        asks: write the beginning of an answer as well.

    Raises:
        SampleError: the template fails.
    """

    def __init__(
        self, rendering: Rendering, messages: list[Message], tools: list[Any] | None, asks: bool = False
    ) -> None:
        self.rendering = rendering
        self.messages = messages
        self.tools = tools
        self.asks = asks
        self.whole = rendering.text(messages, tools, asks)
        """All of it."""
        self._prompts: dict[int, str] = {}

    def prompt(self, index: int) -> str | None:
        """What the message with this index answers, up to where the answer begins; None for the first.

        Raises:
            SampleError: the template fails on it.
        """
        if index and index not in self._prompts:
            self._prompts[index] = self.rendering.text(self.messages[:index], self.tools, prompt=True)
        return self._prompts.get(index)


def _with_thought(message: Message) -> Message:
    """A message with what the assistant thinks under each name by which templates read it."""
    thoughts = [message[name] for name in THOUGHTS if message.get(name) is not None]
    return {"thinking": thoughts[0], **message, "reasoning_content": thoughts[0]} if thoughts else message
