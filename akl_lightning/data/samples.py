"""Conversations, instructions and documents as splits of tokens, whoever takes batches of them."""

import copy
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, Literal, Self

from jsonargparse import lazy_instance
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from akl_lightning.data.aligned import Pairing, align_splits
from akl_lightning.data.chat import Chat, Learn
from akl_lightning.data.collate import LEARNT, TEACHER, Row, Rows, collate, collate_prompts, column
from akl_lightning.data.lengths import Lengths, Truncate
from akl_lightning.data.records import Source
from akl_lightning.data.sources import Docstrings
from akl_lightning.data.splits import check_sizes, split_records
from akl_lightning.errors import UsageError
from akl_lightning.models.load import load_tokenizer

if TYPE_CHECKING:
    import datasets

MAX_LENGTH = 1024
"""Tokens of a sample where nothing else is set; fewer where a model has fewer positions."""


class InstructionData:
    """Conversations, instructions and documents as samples of tokens, in splits.

    A conversation is written by a chat template; of its tokens those of the assistant are learnt, each turn with what
    ends it, and the labels of all others are -100. Of a document every token is learnt.

    What is cut or dropped is counted and said.

    Args:
        tokenizer: a tokenizer, or the hub name or local folder of one; on the command line that of the first model that
            has a name, unless it is given.
        source: where the samples come from.
        template: ``chat`` (the tokenizer's own), ``chatml``, ``plain``, ``alpaca``, a Jinja text, the path of a file
            with one, or a text with ``{instruction}`` and ``{input}`` in it; None for the tokenizer's own, or ``plain``
            where it has none.
        template_arguments: variables of the template, such as ``enable_thinking``.
        learn: of a conversation every turn of the assistant, its last one, or everything.
        special_tokens_in_content: let special tokens in what is said be such tokens, and not text.
        batch_size: samples of a micro-batch, per device.
        max_length: tokens of a sample. 1,024 stands for no choice, so that it is bounded by the models' positions; any
            other number that is beyond them is refused.
        max_prompt_length: tokens of a prompt, what the last turn answers; samples with a longer one are dropped. None
            for ``max_length`` - 1.
        truncate: what becomes of a longer conversation. ``end``: its end is cut off, it keeps its first turns, and a
            response that is cut learns no end; ``start_turns``: whole first turns are left out, but for the system's,
            it keeps its last ones; ``drop``: none of it is kept. Documents are always cut into blocks.
        validation_size: validation samples, as a number or a share, where the source has no such split.
        test_size: test samples, as a number or a share, where the source has no such split.
        group_by_length: let samples of a step be of similar length, which saves padding.
        num_workers: processes that prepare batches, and that tokenize where there is much of it. Tokens are kept in the
            cache of ``datasets`` and found there by later runs.
        predict_split: whose prompts are predicted.
        seed: of the order of the samples.
        trust_remote_code: run Python code that comes with the tokenizer.
        teacher_tokenizer: the teacher's, where it differs; only for one that does not lie beside the teacher.
        teacher_template: how samples are written for a teacher with another tokenizer, as for ``template``.
        teacher_template_arguments: variables of that template, such as ``enable_thinking``.

    Raises:
        UsageError: a tokenizer, template or source that cannot be used, or no usable sample left.
    """

    tokenizer: PreTrainedTokenizerBase

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase | str,
        source: Source = lazy_instance(Docstrings),  # noqa: B008 (how jsonargparse wants a default)
        template: str | None = None,
        batch_size: int = 32,
        max_length: int = MAX_LENGTH,
        max_prompt_length: int | None = None,
        validation_size: int | float = 0.05,
        test_size: int | float = 0.05,
        group_by_length: bool = True,
        num_workers: int = 0,
        predict_split: Literal["train", "validation", "test"] = "test",
        seed: int = 0,
        trust_remote_code: bool = False,
        template_arguments: dict[str, Any] | None = None,
        learn: Learn = "all_turns",
        truncate: Truncate = "end",
        special_tokens_in_content: bool = False,
        teacher_tokenizer: PreTrainedTokenizerBase | str | None = None,
        teacher_template: str | None = None,
        teacher_template_arguments: dict[str, Any] | None = None,
    ) -> None:
        super().__init__()
        self.tokenizer = load_tokenizer(tokenizer, trust_remote_code) if isinstance(tokenizer, str) else tokenizer
        self.chat = Chat(self.tokenizer, template, template_arguments, learn, special_tokens_in_content)
        self.teacher_tokenizer = (
            load_tokenizer(teacher_tokenizer, trust_remote_code)
            if isinstance(teacher_tokenizer, str)
            else teacher_tokenizer
        )
        self.teacher_template = teacher_template
        self.teacher_template_arguments = teacher_template_arguments
        self.pairing: Pairing | None = None
        for name, value, least in (("batch_size", batch_size, 1), ("max_length", max_length, 2)):
            if value < least:
                raise UsageError(f"data.{name} must be {least} or more, got {value}.")
        if num_workers < 0:
            raise UsageError(f"data.num_workers must be 0 or more, got {num_workers}.")
        check_sizes(validation_size, test_size)
        if max_prompt_length is not None and max_prompt_length >= max_length:
            raise UsageError(
                f"data.max_prompt_length = {max_prompt_length} leaves no token of data.max_length = {max_length} for a "
                "response: lower it, or raise the other."
            )
        self.source = source
        self.batch_size = batch_size
        self.max_length = max_length
        self.max_prompt_length = max_prompt_length
        self.truncate: Truncate = truncate
        self.validation_size = validation_size
        self.test_size = test_size
        self.group_by_length = group_by_length
        self.num_workers = num_workers
        self.predict_split = predict_split
        self.seed = seed
        self.records: dict[str, datasets.Dataset] = {}
        self.splits: dict[str, datasets.Dataset] = {}
        self._said: set[str] = set()

    def encode(self) -> None:
        """Load and split, where that is not done yet, and tokenize."""
        from akl_lightning.data.encode import learnt_first, tokenize

        if not self.splits:
            self.chat.introduce()
            self.records = split_records(self.source.load(), self.validation_size, self.test_size)
        lengths = Lengths(self.max_length, self.max_prompt_length, self.truncate)
        self.pairing = None
        self.splits = {
            split: tokenize(split, members, self.chat, lengths, self.num_workers, self._said)
            for split, members in self.records.items()
        }
        self.splits["train"] = learnt_first(self.splits["train"])

    def align(self, tokenizer: PreTrainedTokenizerBase, longest: int | None = None) -> Pairing:
        """Write the samples a second time, for a teacher with another tokenizer; batches hold both from now on.

        Args:
            tokenizer: the teacher's.
            longest: tokens that the teacher has positions for; what lies behind is not aligned.

        Raises:
            UsageError: it does not tell the bytes of its tokens, ends no response, or does not say the samples' texts.
        """
        if self.pairing is None or (self.pairing.tokenizer, self.pairing.longest) != (tokenizer, longest):
            arguments, special = self.teacher_template_arguments, self.chat.special_tokens_in_content
            try:
                teacher = Chat(tokenizer, self.teacher_template, arguments, special_tokens_in_content=special)
            except UsageError as error:  # which names the settings of the student's
                said = str(error).replace("data.template", "data.teacher_template")
                raise UsageError(f"of the teacher's tokenizer: {said}") from error
            pairing = Pairing(self.chat, teacher, longest)
            self.splits = align_splits(self.splits, pairing, self.num_workers)
            self.pairing = pairing
        return self.pairing

    def go_on_from(self, other: Self) -> None:
        """Take the samples of a module with the same settings, which has read and told what is to be told of them."""
        self.records, self.splits, self._said = other.records, other.splits, other._said

    def of_teacher(self) -> Self:
        """The same samples as a teacher with another tokenizer reads them, by themselves; behind :meth:`align`."""
        assert self.pairing is not None
        other = copy.copy(self)
        other.chat, other.tokenizer = self.pairing.chats[1], self.pairing.tokenizer
        other.teacher_tokenizer, other.pairing, other.splits = None, None, {}
        return other

    @property
    def _learnt(self) -> tuple[str, ...]:
        return LEARNT if self.pairing is None else (*LEARNT, *TEACHER)

    def check_answers_fit(self, split: str, setting: str, max_new_tokens: int, positions: int | None) -> None:
        """Check that a model has positions for the longest prompt of a split and an answer to it.

        Args:
            split: whose prompts are answered.
            setting: the name of ``max_new_tokens`` where the user sets it.
            max_new_tokens: tokens of an answer.
            positions: of the model; None where it has no bound.

        Raises:
            UsageError: it has not.
        """
        longest = column(self.splits[split], "prompt_length").max(initial=0)
        if positions and longest + max_new_tokens > positions:
            room = positions - longest
            way_out = f"lower {setting} to {room}" if room > 0 else "lower data.max_prompt_length"
            raise UsageError(
                f"the longest {split} prompt, {longest} tokens, and an answer of {setting} = {max_new_tokens} are "
                f"beyond the {positions} positions of the model: {way_out}."
            )

    def _learnable(self, split: str) -> int:
        """How many samples of a split, its first ones, have something to learn."""
        return int((column(self.splits[split], "learnt") > 0).sum())

    def samples(self, split: str, batch_size: int = 256) -> Iterator[dict[str, Tensor]]:
        """Every sample of a split once, on every rank alike, as batches; for looking at them before training."""
        rows = Rows(self.splits[split], self._learnt)
        for start in range(0, len(rows), batch_size):
            yield self._collate([rows[index] for index in range(start, min(start + batch_size, len(rows)))])

    @property
    def template(self) -> str:
        """How conversations become texts."""
        return self.chat.template

    @property
    def chat_template(self) -> str | dict[str, str] | None:
        """What whoever serves the student needs as the tokenizer's, where that is another; else None."""
        return self.chat.given_template

    @property
    def template_arguments(self) -> dict[str, Any]:
        """Variables of the template."""
        return self.chat.arguments

    @property
    def template_digest(self) -> str:
        """What tells the template, its arguments and what is learnt from others."""
        return self.chat.digest

    @property
    def end_tokens(self) -> list[int]:
        """Tokens at which a turn of the assistant ends."""
        return self.chat.end_tokens

    @property
    def pad_id(self) -> int:
        """Token that fills up rows."""
        pad = self.tokenizer.pad_token_id
        return self.end_tokens[-1] if pad is None else pad

    def _collate(self, rows: list[Row]) -> dict[str, Tensor]:
        return collate(rows, self.pad_id)

    def collate_prompts(self, rows: list[Row]) -> dict[str, Tensor]:
        """Rows of a split, each with its ``index``, as left-padded prompts."""
        return collate_prompts(rows, self.pad_id)
