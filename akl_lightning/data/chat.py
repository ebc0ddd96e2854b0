"""Records as tokens: conversations as their template writes them, and which of their tokens are learnt."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any, Literal

from transformers import PreTrainedTokenizerBase

from akl_lightning.data.messages import for_template, is_learnt, literal_ranges, thought_of
from akl_lightning.data.records import content_text
from akl_lightning.data.rendering import Rendering, SampleError, Written
from akl_lightning.data.templates import CHAT, PINNED, TEMPLATES, is_format, with_defaults
from akl_lightning.data.tokens import Range, Text, Tokenize, Tokens
from akl_lightning.data.turns import Turn, Turns
from akl_lightning.errors import UsageError
from akl_lightning.rank_zero import rank_zero_info

Learn = Literal["all_turns", "last_turn", "everything"]

Record = Mapping[str, Any]
"""A row of a source: ``messages`` and ``tools`` as JSON texts, or a ``text``; see :mod:`akl_lightning.data.records`."""


@dataclass(kw_only=True)
class Noticed:
    """What is to be counted and said of a record."""

    in_pieces: bool = False
    """Whether it was not tokenized in one call, so that its tokens may differ from ``apply_chat_template``'s."""

    tools_left_out: bool = False
    """Whether it has tools that the template does not write."""

    thoughts_left_out: bool = False
    """Whether the assistant thinks what the template does not write."""

    answers_left_out: bool = False
    """Whether it is a prompt, as a question comes last, in which the assistant has said something before."""

    @property
    def noticed(self) -> dict[str, Any]:
        """All of it by name."""
        return {each.name: getattr(self, each.name) for each in fields(Noticed)}


@dataclass
class Encoded(Noticed):
    """A record as tokens."""

    input_ids: list[int]
    """All of it."""

    spans: list[Range] = field(default_factory=list)
    """Tokens that are learnt, from the first to behind the last, what ends a turn included."""

    turns: list[int] = field(default_factory=list)
    """Of each span the number of the assistant's turn, from 0."""

    starts: list[int] = field(default_factory=list)
    """Where the turns of the conversation begin, each a question and what follows on it up to the next.

    Before the first stand the beginning of the text and the system's message, where the template writes it there.
    """

    prompt: str = ""
    """What the last turn of the assistant answers, as a text."""

    prompt_ids: list[int] = field(default_factory=list)
    """The same as tokens."""


@dataclass
class _Plan(Noticed):
    """A record that waits to be tokenized; all places are characters."""

    texts: list[Text]
    """All of it; and its prompt once more, where it does not begin with that."""
    lead: list[int]
    """Tokens that begin it, where it does not begin with them itself."""
    spans: list[Range]
    turns: list[int]
    starts: list[int] = field(default_factory=list)
    prompt: str = ""
    prompt_end: int | None = None
    """How much of it is the prompt, where it begins with that."""
    ends: bool = False
    """Whether the end-of-text token comes behind it."""

    def __post_init__(self) -> None:
        prompt = [] if self.prompt_end is None else [self.prompt_end]
        spans = [place for span in self.spans for place in span]
        self.texts[0].asked = [*self.texts[0].asked, *self.starts, *prompt, *spans]


class Chat:
    """Makes tokens of conversations and documents, and finds those that are learnt.

    A conversation is written by the template as a whole and tokenized in one call, as ``apply_chat_template`` does it.
    What the assistant says is learnt with the token that ends its turn, whatever the template takes for that. Two kinds
    of conversations are tokenized in pieces: those where a token would reach over from a prompt into its answer, and
    those with special tokens in what is said, which stay text.

    Args:
        tokenizer: the tokenizer.
        template: ``chat`` (the tokenizer's own), ``chatml``, ``plain``, ``alpaca``, a Jinja text, the path of a file
            with one, or a format string with ``{instruction}`` and perhaps ``{input}``; None for the tokenizer's own,
            or ``plain`` where it has none.
        arguments: variables of the template, such as ``enable_thinking``.
        learn: every turn of the assistant, the last alone, or everything that is not marked ``"learn": false``.
        special_tokens_in_content: let special tokens in what is said be such tokens.

    Raises:
        UsageError: a template that cannot be used with this tokenizer.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        template: str | None = None,
        arguments: Mapping[str, Any] | None = None,
        learn: Learn = "all_turns",
        special_tokens_in_content: bool = False,
    ) -> None:
        self._is_given = template not in (None, CHAT)
        self.tokenizer = tokenizer
        self.arguments = dict(arguments or {})
        self.learn = learn
        self.special_tokens_in_content = special_tokens_in_content
        self.rendering = Rendering(tokenizer, template, arguments)
        """The template, and what was found out about it."""
        self.template = template = self.rendering.template
        self._turns = Turns(self.rendering)
        self._tokenize = Tokenize(tokenizer)
        # A tokenizer's own template writes the beginning itself, or means none.
        self._lead = [] if template == CHAT else self._tokenize.lead
        # Some begin every turn with the same token.
        self._begins_with_bos = not self.rendering.user_head.startswith(tokenizer.bos_token or "\0")
        self._bos, self._eos = tokenizer.bos_token_id, tokenizer.eos_token_id
        self._own_input = template in TEMPLATES or is_format(template)
        if not self.rendering.ends and tokenizer.eos_token_id is None:
            raise UsageError(
                "the tokenizer has no end-of-text token (eos_token) and the template ends a turn with none of its "
                "tokens: set one, responses end with it."
            )

    @property
    def given_template(self) -> str | dict[str, str] | None:
        """The chat template with which a tokenizer writes what was learnt from, without being told anything; Jinja.

        It has the beginning of the text, where that is no part of it, and the arguments as defaults. None where the
        tokenizer's own will do; a mapping where that is several, by their names.
        """
        own = self.tokenizer.chat_template
        if not self._is_given and (own is None or not self.arguments):
            return None
        if not self._is_given and isinstance(own, dict):
            return {name: with_defaults(text, self.arguments) for name, text in own.items()}
        if not self._is_given:
            return with_defaults(own, self.arguments)
        text, _ = self.rendering.texts
        begins = "".join(self.tokenizer.convert_ids_to_tokens(self._lead))
        writes_it = self.rendering.text([{"role": "user", "content": "a"}]).startswith(begins)
        return with_defaults(text if writes_it else f"{{{{ {begins!r} }}}}{text}", self.arguments)

    def introduce(self) -> None:
        """Say what one would not expect of the template."""
        rendering = self.rendering
        if rendering.system:
            rank_zero_info(f"the chat template writes a system prompt by itself: {rendering.system[:120]!r}")
        if rendering.writes_date:
            rank_zero_info(
                f"the chat template writes today's date: it is given {PINNED:%d %B %Y}, so that runs and caches agree "
                "whenever they are made; another comes through data.template_arguments where the template takes one"
            )
        if rendering.asks_otherwise:
            rank_zero_info(
                f"the chat template asks for an answer with {rendering.asks_otherwise!r}, behind which it does not "
                "write one that is there: answers are learnt behind other tokens than they are asked for with"
            )
        if self.tokenizer.eos_token_id is None:
            rank_zero_info("the tokenizer has no end-of-text token: documents end without one")
        if not rendering.ends:
            rank_zero_info(
                "the chat template ends a turn of the assistant with no token: the end-of-text token "
                f"{self.tokenizer.eos_token} is learnt after the last turn of a conversation"
            )

    @property
    def end_tokens(self) -> list[int]:
        """Tokens at which a turn of the assistant ends, by the template and by the tokenizer."""
        ids = [self.tokenizer.convert_tokens_to_ids(end) for end in self.rendering.ends]
        eos = self.tokenizer.eos_token_id
        return list(dict.fromkeys(ids if eos is None else [*ids, eos]))

    @property
    def digest(self) -> str:
        """SHA-256 of what the tokens depend on beside the records and the tokenizer."""
        settings = [self.rendering.texts, self.arguments, self.learn, self.special_tokens_in_content, self._own_input]
        settings.append(self._lead)
        return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()

    def encode(self, record: Record) -> Encoded:
        """One record as tokens.

        Raises:
            SampleError: the template refuses it, or it cannot be told which tokens are learnt.
        """
        (encoded,) = self.encode_many([record])
        if isinstance(encoded, SampleError):
            raise encoded
        return encoded

    def encode_many(self, records: Sequence[Record]) -> list[Encoded | SampleError]:
        """Records as tokens, in one call; in the place of one that is refused stands the reason."""
        plans: list[_Plan | SampleError] = []
        for record in records:
            try:
                plans.append(self._plan(record))
            except SampleError as error:
                where = f"{record['file']}, line {record['line']}: " if record.get("file") else ""
                plans.append(SampleError(f"{where}{error}"))
        good = [plan for plan in plans if isinstance(plan, _Plan)]
        tokens = iter(self._tokenize.many([text for plan in good for text in plan.texts]))
        return [
            plan if isinstance(plan, SampleError) else self._encoded(plan, *(next(tokens) for _ in plan.texts))
            for plan in plans
        ]

    def answer(self, prompt: Sequence[int], text: str) -> list[int]:
        """Tokens of an answer to a prompt, with what the assistant itself writes before it, without what ends it."""
        before, pattern = self.rendering.before, self._tokenize.special_pattern
        found = () if self.special_tokens_in_content else pattern.finditer(text)
        literal = [(len(before) + start, len(before) + end) for start, end in (one.span() for one in found)]
        return self._tokenize.behind(prompt, before + text, literal)

    # ----------------------------------------------------------------------------------------------------------------
    # Before the tokens

    def _plan(self, record: Record) -> _Plan:
        ends = not record.get("cut")
        if record["text"]:
            text, pattern = record["text"], self._tokenize.special_pattern
            literal = [] if self.special_tokens_in_content else [found.span() for found in pattern.finditer(text)]
            return _Plan([Text(text, literal=literal)], self._tokenize.lead, [(0, len(text))], [0], ends=ends)
        messages = json.loads(record["messages"])
        learnt = [is_learnt(message) for message in messages if message["role"] == "assistant"]
        messages = [for_template(message, self.rendering, self._own_input) for message in messages]
        tools = json.loads(record["tools"]) if record["tools"] else None
        written = Written(self.rendering, messages, tools, asks=messages[-1]["role"] != "assistant")
        plan = self._prompt(written, learnt) if written.asks else self._answer(written, learnt, ends)
        plan.tools_left_out = bool(tools) and not self.rendering.writes_tools
        return plan

    def _prompt(self, written: Written, learnt: list[bool]) -> _Plan:
        try:
            turns = self._turns.find(written)
        except SampleError:  # nothing of it is learnt
            turns = []
        prompt = written.whole
        return _Plan(
            [Text(prompt, literal=self._literal(written))],
            self._lead,
            spans=[],
            turns=[],
            starts=self._starts(written, turns),
            prompt=prompt,
            prompt_end=len(prompt),
            answers_left_out=any(learnt),
        )

    def _answer(self, written: Written, learnt: list[bool], ends: bool) -> _Plan:
        rendering, whole, (*before, _) = self.rendering, written.whole, written.messages
        prompt = written.prompt(len(before))
        for message in before:
            said = content_text(message).strip()
            if message["role"] != "assistant" and prompt is not None and said in prompt and said not in whole:
                raise SampleError(f"the chat template leaves out what the {message['role']} says once it is answered.")
        turns = self._turns.find(written)
        last = turns[-1]
        learnt = [learn and turn.says(whole) for turn, learn in zip(turns, learnt, strict=True)]
        prompt = whole[: last.start] if prompt is None else prompt
        if self.learn == "last_turn":
            learnt = [False] * (len(turns) - 1) + learnt[-1:]
        stop = len(whole) if ends and rendering.ends else last.end if ends else last.said
        spans = [
            (number, start, min(end, stop))
            for number, (turn, learn) in enumerate(zip(turns, learnt, strict=True))
            for start, end in turn.learnt
            if learn
        ]
        goes_on = prompt == whole[: last.start]
        # Where no token ends a turn, the next one is not to reach into it.
        cuts = [start for _, start, _ in spans] + ([] if rendering.ends else [end for _, _, end in spans])
        cuts += [last.start] if goes_on else []
        left_out = [(turn.start, min(turn.end, stop)) for turn, learn in zip(turns, learnt, strict=True) if not learn]
        if self.learn == "everything":
            spans = [(0, start, end) for start, end in _others(left_out, 0, stop)]  # pieces, not turns
        # What is tokenized in pieces is cut at these, too: else the tokens of some samples would not be those that a
        # teacher's cache was written for.
        asked = [edge for turn in left_out for edge in turn]
        texts = [Text(whole[:stop], [cut for cut in cuts if cut < stop], asked, self._literal(written))]
        if not goes_on:
            texts.append(Text(prompt, literal=self._literal(Written(rendering, before, written.tools, asks=True))))
        return _Plan(
            texts,
            self._lead,
            spans=[(start, end) for _, start, end in spans],
            turns=[number for number, _, _ in spans],
            starts=self._starts(written, turns),
            prompt=prompt,
            prompt_end=last.start if goes_on else None,
            ends=ends and not rendering.ends,
            thoughts_left_out=_thoughts_left_out(written, turns),
        )

    def _literal(self, written: Written) -> list[Range]:
        return [] if self.special_tokens_in_content else literal_ranges(self._tokenize.special_pattern, written)

    def _starts(self, written: Written, turns: list[Turn]) -> list[int]:
        """Where questions begin, each with its head."""
        behind = iter(turns)
        starts = [self._first(written)]
        previous = None
        for message in written.messages:
            if previous is not None and message["role"] == "user":
                rest = written.whole[previous.end :]
                starts.append(previous.end + len(rest) - len(rest.lstrip()))
            previous = next(behind, None) if message["role"] == "assistant" else None
        return starts

    def _first(self, written: Written) -> int:
        """Where the first message begins that is not the system's."""
        whole, messages = written.whole, written.messages
        index = next((index for index, message in enumerate(messages) if message["role"] != "system"), 0)
        head, text = self.rendering.user_head, content_text(messages[index]).strip()
        found = whole.find(head + text) if head and text and messages[index]["role"] == "user" else -1
        if found < 0 and index:
            try:
                alone = self.rendering.text(messages[:index])
            except SampleError:  # some take no system's message without a question
                return 0
            return len(alone) if whole.startswith(alone) else 0
        return max(found, 0)

    # ----------------------------------------------------------------------------------------------------------------
    # Behind the tokens

    def _encoded(self, plan: _Plan, tokens: Tokens, apart: Tokens | None = None) -> Encoded:
        ids = _begun(tokens.ids, plan.lead)
        shift = len(ids) - len(tokens.ids)
        at = {place: index + shift for place, index in tokens.at.items()}
        first = shift or int(self._begins_with_bos and ids[:1] == [self._bos])
        prompt_ids = [] if plan.prompt_end is None else ids[: at[plan.prompt_end]]
        if apart is not None:
            prompt_ids = _begun(apart.ids, plan.lead)
        spans = [(max(first, at[start]), at[end]) for start, end in plan.spans]
        if plan.ends and self._eos is not None:
            if spans and spans[-1][1] == len(ids):
                spans[-1] = (spans[-1][0], len(ids) + 1)
            ids = [*ids, self._eos]
        return Encoded(
            ids,
            [span for span in spans if span[0] < span[1]],
            [number for number, span in zip(plan.turns, spans, strict=True) if span[0] < span[1]],
            [max(first, at[place]) for place in plan.starts],
            plan.prompt,
            prompt_ids,
            **{**plan.noticed, "in_pieces": tokens.in_pieces},
        )


def _begun(ids: list[int], lead: list[int]) -> list[int]:
    """Tokens with those that begin a text, once."""
    return ids if ids[: len(lead)] == lead else [*lead, *ids]


def _thoughts_left_out(written: Written, turns: list[Turn]) -> bool:
    answers = [message for message in written.messages if message["role"] == "assistant"]
    said = [written.whole[turn.start : turn.end] for turn in turns]
    return any(thought_of(message) not in text for message, text in zip(answers, said, strict=True))


def _others(ranges: list[Range], start: int, end: int) -> list[Range]:
    """What is left of a range without some, which are in order.

    >>> _others([(3, 5)], 1, 9)
    [(1, 3), (5, 9)]
    """
    edges = [start, *(edge for one in ranges for edge in one), end]
    return list(zip(edges[::2], edges[1::2], strict=True))
