"""The usual forms of training data, told by their fields, and how each becomes a record."""

import json
from collections import Counter
from collections.abc import Iterable, Mapping
from contextlib import suppress
from itertools import combinations
from typing import Any, NamedTuple, NoReturn

from akl_lightning.data.records import Message, Row, conversation, document
from akl_lightning.errors import UsageError

ROLES = {
    **dict.fromkeys(("system", "developer"), "system"),
    **dict.fromkeys(("user", "human"), "user"),
    **dict.fromkeys(("assistant", "gpt", "model", "chatgpt", "function_call"), "assistant"),
    **dict.fromkeys(("tool", "function", "observation", "function_response", "tool_response", "ipython"), "tool"),
}
"""The roles of OpenAI's and ShareGPT's messages, and what they are called here."""

_REPLIES = ("completion", "output", "response", "responses", "answer", "answers", "reply", "target", "references")
"""Fields that may be the answer to a prompt for which none is known, so that it is not taken for a prompt alone."""

_ALSO_READ = (
    *("conversations", "prompt", "completion", "chosen", "rejected"),
    *("system", "system_prompt", "history", "tools", "functions", "cut"),
)


_SAID_APART = {"role", "from", "content", "value"}
"""Keys of a message that have one name here."""


class _Form(NamedTuple):
    """A form, told by its fields."""

    name: str
    asked: str
    """Field of what is asked, of all messages, or of a document; empty where the reply says it, too."""

    reply: str = ""
    """Field of what is answered; empty where there is none, or messages hold it."""


class Forms:
    """Reads records of any usual form; the forms may be mixed.

    In this order: ``instruction`` and ``output`` where they are named otherwise than by default; ``messages`` (OpenAI),
    to which ``chosen`` or ``output`` is added where they end with a prompt; ``conversations`` (ShareGPT), likewise;
    ``prompt`` with ``completion`` or ``chosen``; ``instruction`` with ``output`` or ``chosen``, and ``input``,
    ``system`` and ``history`` (Alpaca); ``chosen`` alone, as messages; ``text`` (a document); ``prompt`` or
    ``instruction`` alone. What another form would have read is left, and counted. ``tools`` and ``system`` belong to
    any conversation. A field that is null counts as absent; numbers and booleans are read as JSON writes them.

    Args:
        instruction: field of the instruction.
        input: field of its input; it may be missing.
        output: field of the response, a text or a list of acceptable ones, of which the first is learnt.
        messages: field of the messages.
        text: field of a document.

    Raises:
        UsageError: two of them are the same field.
    """

    def __init__(
        self,
        instruction: str = "instruction",
        input: str = "input",
        output: str = "output",
        messages: str = "messages",
        text: str = "text",
    ) -> None:
        self.names = {"instruction": instruction, "input": input, "output": output, "messages": messages, "text": text}
        for one, other in (*combinations(("instruction", "input", "output"), 2), ("messages", "text")):
            if self.names[one] == self.names[other]:
                raise UsageError(
                    f"the field {self.names[one]!r} cannot be both {one} and {other}: name two fields in the source."
                )
        self.columns = {*self.names.values(), *_ALSO_READ, *_REPLIES}
        """All fields that are looked at."""
        mains = (messages, "conversations", "prompt", "completion", instruction, output, "chosen", text)
        self.mains = tuple(dict.fromkeys(mains))
        """Fields of which a form takes some, and leaves others."""
        pair = _Form("instruction", instruction, output)
        named = [pair] if (instruction, output) != ("instruction", "output") else []
        of_pair = {instruction, input, output}
        # A text or messages may be a pair's instruction: then they are no form of their own.
        dialog = [_Form("messages", messages)] if messages not in of_pair else []
        self.forms = [
            # As akl generate writes a conversation: it is its own instruction.
            *(dialog + named if instruction == "instruction" else named + dialog),
            _Form("conversations", "conversations"),
            *([_Form("prompt_completion", "prompt", output)] if output != "output" else []),
            _Form("prompt_completion", "prompt", "completion"),
            _Form("preference", "prompt", "chosen"),
            pair,
            _Form("preference", instruction, "chosen"),
            _Form("preference", "", "chosen"),
            *([_Form("text", text)] if text not in of_pair else []),
            _Form("prompt", "prompt"),
            _Form("prompt", instruction),
        ]
        """Of those whose fields a record has, it is of the first."""

    def read(
        self, record: Mapping[str, Any], file: str, line: int, where: str, split: str, notes: Counter
    ) -> Row | None:
        """The row of a record.

        Args:
            record: its fields.
            file: that it is in.
            line: of the file.
            where: both in words.
            split: records without a response are kept for a ``test``, where they are prompts to answer.
            notes: counts what is left and dropped, by the words that say so.

        Returns:
            None where it has no prompt, or no response to learn.

        Raises:
            UsageError: it fits no form, or its fields do not fit theirs.
        """
        one = _Record(self, record, where, notes)
        try:
            form = one.form()
            if form.name == "text":
                text = one.text(form.asked, one.given[form.asked])
                if not text.strip():
                    notes["dropped, without a text"] += 1
                    return None
                return document(text, file, line)
            messages, references, wants_response = one.conversation(form)
            if not any(_says(message) for message in messages if message["role"] != "assistant"):
                notes["dropped, without a prompt"] += 1
                return None
            answers = [message for message in messages if message["role"] == "assistant"]
            ends_blank = messages[-1]["role"] == "assistant" and not _says(messages[-1])
            if wants_response or (answers and not any(map(_says, answers))):
                if split != "test":
                    notes["dropped, without a response"] += 1
                    return None
                messages = messages[:-1] if ends_blank else messages
            cut = one.given.get("cut") in (True, "True", "true")  # a text in a CSV file
            return conversation(messages, form.name, file, line, one.tools(), references, cut)
        except UnicodeEncodeError as error:  # "\ud800" is JSON, but no text that could be tokenized
            raise UsageError(f"{where} is no JSON in UTF-8 ({error}): mend or remove the line.") from error
        except TypeError as error:  # an image, a date
            raise UsageError(f"{where} holds what is no text ({error}): write it as one.") from error


class _Record:
    """One record while it is read."""

    def __init__(self, forms: Forms, record: Mapping[str, Any], where: str, notes: Counter) -> None:
        self.names = forms.names
        self.forms = forms
        self.given = {name: value for name, value in record.items() if not _absent(value)}
        self.where = where
        self.notes = notes

    def form(self) -> _Form:
        given = self.given
        form = next((form for form in self.forms.forms if given.keys() >= {form.asked, form.reply} - {""}), None)
        if form is None:
            self.refuse(f"fits no form, its fields are {', '.join(map(str, given)) or 'none'}: name them in the source")
        if form.name in ("text", "prompt"):
            self.expect_no_reply(form.asked)
        if form.name not in ("messages", "conversations"):
            self.leave(self.forms.mains, form.asked or form.reply, form.reply)
        return form

    def leave(self, names: Iterable[str], beside: str, *used: str) -> None:
        """Count which of some fields are there and not used."""
        for name in names:
            if name in self.given and name not in (beside, *used):
                self.notes[f"have a field {name!r} that is left, because of their {beside!r}"] += 1

    def expect_no_reply(self, field: str) -> None:
        replies = [name for name in (self.names["output"], *_REPLIES) if name in self.given and name != field]
        if replies:
            self.refuse(
                f"has no field {self.names['output']!r} beside {field!r}, only {', '.join(self.given)}: name its "
                "fields in the source"
            )

    def conversation(self, form: _Form) -> tuple[list[Message], list[str], bool]:
        """Messages, the acceptable last responses, and whether the response that should be there is not."""
        if "rejected" in self.given:
            self.notes["have a rejected response, which is left"] += 1
        reply = form.reply
        if form.name in ("messages", "conversations"):
            messages, reply = self.dialog(form.asked)
        else:
            messages = self.prompt(form.asked) if form.asked else []
        responses, references = self.responses(reply) if reply else ([], [])
        if form.name == "preference" and responses and responses[0]["role"] != "assistant":
            messages = self.whole(messages, responses)
        elif form.name == "preference" and not messages:
            self.refuse("has a chosen response without a prompt: add the field 'prompt'")
        else:
            messages += responses
        return self.with_system(messages), references, bool(reply) and not responses

    def dialog(self, field: str) -> tuple[list[Message], str]:
        """Messages, and the field of the reply to them where they end with a prompt."""
        messages, reply = self.messages(field, self.given[field]), ""
        if messages and messages[-1]["role"] != "assistant":
            replies = ("chosen", "completion", self.names["output"])
            reply = next((name for name in replies if name in self.given), "")
            if not reply:
                self.expect_no_reply(field)
        # akl generate writes what is answered once more as an instruction.
        self.leave((*self.forms.mains, "history"), field, reply, *([self.names["instruction"]] if reply else []))
        return messages, reply

    def prompt(self, field: str) -> list[Message]:
        names, given = self.names, self.given
        if isinstance(given[field], list):
            self.leave(("history", names["input"]), field)
            return self.messages(field, given[field])
        message = {"role": "user", "content": self.text(field, given[field])}
        if names["input"] in given:
            said = self.text(names["input"], given[names["input"]])
            message |= {"input": said} if said else {}
        history: list[Message] = []
        if "history" in given:
            for turn in self.listed("history", given["history"]):
                if not isinstance(turn, list) or len(turn) != 2:
                    self.refuse(f"the field 'history' has {str(turn)[:40]!r}, which is no pair of prompt and response")
                for role, said in zip(("user", "assistant"), turn, strict=True):
                    history.append({"role": role, "content": self.text("history", said)})
        return [*history, message]

    def responses(self, field: str) -> tuple[list[Message], list[str]]:
        """The messages of a response, and the texts that would do where it is a list of them."""
        value = self.given[field]
        if isinstance(value, dict) or (isinstance(value, list) and any(isinstance(one, dict) for one in value)):
            messages = self.messages(field, [value] if isinstance(value, dict) else value)
            if messages[-1]["role"] != "assistant":
                self.refuse(
                    f"the field {field!r} does not end with the assistant's message: give what is answered as one"
                )
            return (messages, []) if any(map(_says, messages)) else ([], [])
        values = value if isinstance(value, list) else [value]
        texts = [self.text(field, one) for one in values if not _absent(one)]
        texts = [text for text in texts if text.strip()]
        return [{"role": "assistant", "content": text} for text in texts[:1]], texts

    def whole(self, prompt: list[Message], chosen: list[Message]) -> list[Message]:
        """Chosen messages that hold their prompt as well."""
        contents = [message["content"] for message in chosen[:-1]]
        if any(message["content"] not in contents for message in prompt):
            self.refuse("has a prompt that is not among the chosen messages, which begin with one: leave out either")
        return chosen

    def with_system(self, messages: list[Message]) -> list[Message]:
        for field in ("system", "system_prompt"):
            said = self.text(field, self.given[field]) if field in self.given else ""
            if not said.strip():
                continue
            if not messages or messages[0]["role"] != "system":
                messages = [{"role": "system", "content": said}, *messages]
            elif messages[0]["content"] != said:
                self.refuse(f"has a system message and another one under {field!r}: leave out either")
        return messages

    def tools(self) -> list[Any]:
        if "tools" in self.given:
            self.leave(["functions"], "tools")
            return self.listed("tools", self.given["tools"])
        functions = self.listed("functions", self.given.get("functions", []))
        return [{"type": "function", "function": function} for function in functions]

    def listed(self, field: str, value: Any) -> list[Any]:
        """A list, or the JSON of one, as column files hold it."""
        if isinstance(value, str):
            value = self.parsed(value or "[]", f"the field {field!r} is a text and no JSON of a list")
        if not isinstance(value, list):
            self.refuse(f"the field {field!r} is no list but {str(value)[:40]!r}")
        return value

    def parsed(self, written: str, otherwise: str) -> Any:
        try:
            return json.loads(written)
        except ValueError as error:
            self.refuse(f"{otherwise} ({error})")

    def text(self, field: str, value: Any) -> str:
        if isinstance(value, str):
            return value
        if isinstance(value, bool | int | float):
            written = json.dumps(value)
            self.notes[f"have a number or boolean under {field!r}, read as a text"] += 1
            return written
        self.refuse(f"the field {field!r} is no text but {str(value)[:40]!r}: write it as a string")

    def messages(self, field: str, value: Any) -> list[Message]:
        return [self.message(number, one) for number, one in enumerate(self.listed(field, value), 1)]

    def message(self, number: int, given: Any) -> Message:
        at = f"message {number}"
        if not isinstance(given, dict):
            self.refuse(f"{at} is no object but {str(given)[:40]!r}")
        called = given.get("from") if given.get("role") is None else given["role"]
        content = given.get("value") if given.get("content") is None else given["content"]
        given = {name: value for name, value in given.items() if value is not None and name not in _SAID_APART}
        role = ROLES.get(called.lower()) if isinstance(called, str) else None
        if role is None:
            said = "no role" if called is None else f"the unknown role {called!r}"
            self.refuse(f"{at} has {said}: use system, user, assistant or tool (or human and gpt)")
        if called == "function_call" and content is not None:
            calls, content = content, None
        else:
            calls = given.pop("tool_calls" if "tool_calls" in given else "function_call", None)
        if calls:
            given["tool_calls"] = self.calls(at, calls)
        if isinstance(content, list):
            content = [{"type": "text", "text": part} if isinstance(part, str) else part for part in content]
            if odd := [part for part in content if not isinstance(part, dict)]:
                self.refuse(f"{at} has {str(odd[0])[:40]!r} among the parts of its content: give texts")
        elif content is not None:
            content = self.text(f"{at}: content", content)
        elif not given.get("tool_calls") and not given.get("reasoning_content"):
            self.refuse(f"{at} ({called}) has no content")
        if "input" in given:
            given["input"] = self.text(f"{at}: input", given["input"])
        learn = self.learn(at, role, given.pop("learn", None), given.pop("weight", None))
        return {"role": role, "content": content, **given, **({} if learn else {"learn": False})}

    def learn(self, at: str, role: str, learn: Any, weight: Any) -> bool:
        for name, value in (("learn", learn), ("weight", weight)):
            if value is not None and value not in (0, 1):
                self.refuse(
                    f"{at} has {value!r} as its {name!r}: use {'true or false' if name == 'learn' else '0 or 1'}"
                )
        if role != "assistant" and (learn or weight):
            self.refuse(f"{at} is the {role}'s and to be learnt, but only the assistant's are: leave it out")
        return role != "assistant" or all(value in (None, 1) for value in (learn, weight))

    def calls(self, at: str, calls: Any) -> list[Any]:
        """Calls of tools, their arguments as objects, as chat templates want them."""
        if isinstance(calls, str):
            calls = self.parsed(calls, f"{at} is a call of a tool but no JSON")
        found = []
        for call in calls if isinstance(calls, list) else [calls]:
            if not isinstance(call, dict):
                self.refuse(f"{at} has {str(call)[:40]!r} as a call of a tool: give its name and arguments")
            call = dict(call) if "function" in call else {"type": "function", "function": call}
            function = call["function"]
            if not isinstance(function, dict) or not isinstance(function.get("name"), str):
                self.refuse(f"{at} has a call of a tool without a name")
            arguments = function.get("arguments")
            if isinstance(arguments, str):
                with suppress(ValueError):  # a model's own slip, to be shown as it is
                    function = {**function, "arguments": json.loads(arguments or "{}")}
            found.append({**call, "function": function})
        return found

    def refuse(self, reason: str) -> NoReturn:
        joint = ": " if reason.startswith(("message ", "the field ")) else " "
        raise UsageError(f"{self.where}{joint}{reason}.")


def _absent(value: Any) -> bool:
    return value is None or value != value  # null, and what pandas writes for it


def _says(message: Message) -> bool:
    content = message["content"]
    return bool(content.strip() if isinstance(content, str) else content or message.get("tool_calls")) or bool(
        message.get("reasoning_content")
    )
