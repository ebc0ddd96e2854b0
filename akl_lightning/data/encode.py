"""The records of a split as rows of tokens, in Arrow, where later runs find them."""

import json
from collections.abc import Iterator
from dataclasses import asdict, fields
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import tokenizers
import transformers
from transformers import PreTrainedTokenizerBase

from akl_lightning.cached import content_of, key_of, map_tables
from akl_lightning.data import chat as chats
from akl_lightning.data import lengths as fitting
from akl_lightning.data import messages, rendering, templates, tokens, turns
from akl_lightning.data import records as forms_of_records
from akl_lightning.data.chat import Chat, Noticed
from akl_lightning.data.collate import column
from akl_lightning.data.lengths import Fitted, Lengths, fit
from akl_lightning.data.store import RECORD_FEATURES
from akl_lightning.errors import UsageError
from akl_lightning.rank_zero import rank_zero_info

_IDS = datasets.List(datasets.Value("int32"))
_COUNT = datasets.Value("int32")

_OF_RECORD = ("messages", "tools", "references", "cut", "form", "file", "line", "name")

ROW_FEATURES = datasets.Features(
    {
        **{name: RECORD_FEATURES[name] for name in _OF_RECORD},
        "input_ids": _IDS,
        "spans": _IDS,  # first and behind the last of each range of learnt tokens, one after the other
        "turns": _IDS,  # the number of the assistant's turn that each range belongs to
        "prompt": datasets.Value("string"),  # what the last turn answers; empty where it is not to be answered
        "prompt_ids": _IDS,
        "prompt_length": _COUNT,
        "length": _COUNT,
        "learnt": _COUNT,  # tokens
        "kept": datasets.Value("bool"),
        "whole": _COUNT,
        "note": datasets.Value("string"),
        **{each.name: datasets.Value("bool") for each in fields(Noticed)},
    }
)
"""Columns of a tokenized split: those of the record, of which a row has the messages that are left; the tokens; and
what is said of them, see :class:`~akl_lightning.data.lengths.Fitted`."""

_BATCH_BYTES = 2**23


def tokenize(
    split: str,
    records: datasets.Dataset,
    chat: Chat,
    lengths: Lengths,
    num_proc: int = 0,
    said: set[str] | None = None,
) -> datasets.Dataset:
    """The rows of a split, in the records' order; what is cut or dropped is counted and said.

    Args:
        split: its name.
        records: its records.
        chat: makes tokens of them.
        lengths: how many at most.
        num_proc: processes that do it, where there is much of it.
        said: what was said before, and is not again; what is said now is added.

    Raises:
        UsageError: no row is left of the records.
    """
    if not len(records):
        return datasets.Dataset.from_dict({name: [] for name in ROW_FEATURES}, ROW_FEATURES)
    content, size = content_of(records, [*_OF_RECORD, "text"])
    described, versions = _described(chat.tokenizer), [transformers.__version__, tokenizers.__version__]
    rows = map_tables(
        records,
        _encode,
        {"chat": chat, "lengths": lengths},
        key_of([content, chat.digest, described, asdict(lengths), versions], _CODE),
        ROW_FEATURES,
        num_proc,
        f"Tokenizing {split}",
        # A batch lies in memory, and documents may be long.
        batch_size=max(1, min(1000, _BATCH_BYTES * len(records) // max(1, size))),
        found_again=described is not None,
    )
    said = set() if said is None else said
    for line in _summary(split, rows, lengths):
        if line not in said:
            rank_zero_info(line)
            said.add(line)
    kept = column(rows, "kept")
    if not kept.any():
        raise UsageError(_none_left(split, rows, lengths))
    return rows if kept.all() else rows.select(np.flatnonzero(kept))


def learnt_first(rows: datasets.Dataset) -> datasets.Dataset:
    """Those of which something is learnt, in their order, then prompts alone."""
    learnt = column(rows, "learnt") > 0
    return rows if learnt.all() else rows.select(np.argsort(~learnt, kind="stable"))


# A function of its arguments alone, which name the file that its result is cached in.
def _encode(records: pa.Table, chat: Chat, lengths: Lengths) -> pa.Table:
    rows = fit(records.to_pylist(), chat.encode_many, lengths)
    return pa.Table.from_pylist([_columns(row) for row in rows], ROW_FEATURES.arrow_schema)


def _columns(row: Fitted) -> dict[str, Any]:
    """A value for each of :data:`ROW_FEATURES`, and others."""
    return {
        **row.record,
        **vars(row),
        "spans": [edge for span in row.spans for edge in span],
        "prompt_length": len(row.prompt_ids),
        "length": len(row.input_ids),
        "learnt": sum(end - start for start, end in row.spans),
    }


_CODE = (_encode, _columns, fitting, chats, messages, forms_of_records, rendering, templates, tokens, turns)


def _described(tokenizer: PreTrainedTokenizerBase) -> Any:
    """All that the tokens of a text depend on; None of a tokenizer that does not tell."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        return None
    # Its own fingerprint changes with the padding and truncation that the last call has left in the tokenizer.
    return [json.loads(backend.to_str()) | {"padding": None, "truncation": None}, tokenizer.special_tokens_map]


# --------------------------------------------------------------------------------------------------------------------
# What is said of them


def _summary(split: str, rows: datasets.Dataset, lengths: Lengths) -> Iterator[str]:
    table = rows.select_columns(["note", "whole", "file", "line", "form", *_FLAGS])
    table = table.with_format("arrow")[:]
    documents = table.filter(pc.field("form") == "text")
    conversations = len(table) - len(documents)
    cut = documents.filter(pc.field("note") == "block")
    samples = conversations + _different(documents)
    if len(cut):
        yield (
            f"{split}: {_different(cut):,} of {_different(documents):,} documents cut into {len(cut):,} blocks of "
            f"{lengths.max_length:,} tokens"
        )
    notes = table.group_by("note", use_threads=False).aggregate([("whole", "count"), ("whole", "max")]).to_pylist()
    found = {note["note"]: (note["whole_count"], note["whole_max"]) for note in notes}
    for note, sentence in _SAID.items():
        if note in found:
            count, most = found.pop(note)
            total = conversations if note in ("response", "end", "start_turns") else samples
            settings = {"length": lengths.max_length, "prompt": lengths.longest_prompt, "bound": lengths.bound}
            yield f"{split}: {count:,} of {total:,} {sentence.format(most=most, **settings)}"
    refused = [note for note in found if note not in ("", "block", "nothing")]
    if refused:
        count = sum(found[note][0] for note in refused)
        yield f"{split}: {count:,} of {samples:,} samples dropped, the first for {refused[0]}"
    for name, sentence in _FLAGS.items():
        if count := pc.sum(table[name]).as_py():
            yield f"{split}: {count:,} of {len(table):,} samples {sentence}"


def _different(rows: pa.Table) -> int:
    """How many records rows are of."""
    return len(rows.group_by(["file", "line"]).aggregate([]))


_SAID = {
    "response": "responses cut at {length:,} tokens, the longest has {most:,}: raise data.max_length",
    "end": "conversations cut at {length:,} tokens, of which they keep the first turns, the longest has {most:,}: "
    "raise data.max_length, or set data.truncate to start_turns to keep the last",
    "start_turns": "conversations cut at {length:,} tokens, of which they keep the last turns, the longest has "
    "{most:,}: raise data.max_length",
    "drop": "samples dropped, they are longer than {length:,} tokens, the longest has {most:,}: raise "
    "data.max_length, or let data.truncate cut them",
    "prompt": "samples dropped, their prompts are longer than {prompt:,} tokens, the longest has {most:,}: raise "
    "{bound}",
}
"""What is said of the notes of :class:`~akl_lightning.data.lengths.Fitted`."""

_FLAGS = {
    "in_pieces": "tokenized in pieces, since special tokens in what is said are text there, or a token would reach "
    "from a prompt into its response",
    "thoughts_left_out": "have thoughts of the assistant that the chat template does not write, they are not learnt",
    "answers_left_out": "end with a question and are prompts, the answers before it are not learnt: leave the question "
    "out of the data to learn them",
    "tools_left_out": "have tools, which the chat template does not write: give another data.template",
}


def _none_left(split: str, rows: datasets.Dataset, lengths: Lengths) -> str:
    notes, whole = column(rows, "note"), column(rows, "whole")
    said = f"no usable {split} sample left"
    prompts = whole[notes == "prompt"]
    if len(prompts) == len(rows):
        return (
            f"{said}: every prompt is longer than {lengths.longest_prompt} tokens; raise {lengths.bound}, the shortest "
            f"has {prompts.min()}."
        )
    if len(prompts) or (notes == "drop").any():
        return f"{said} of {len(rows)}: raise {lengths.bound}, the shortest has {whole[whole > 0].min()} tokens."
    reason = next((note for note in notes if note not in _SAID), "")
    return (
        f"{said} of {len(rows)}: {reason}"
        if reason != "nothing"
        else f"{said} of {len(rows)}: nothing is to be learnt."
    )
