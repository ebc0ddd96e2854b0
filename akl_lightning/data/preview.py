"""Samples as the model sees them: their tokens as text, with what is learnt of them marked."""

import unicodedata
from collections.abc import Iterator, Mapping
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table
from rich.text import Text
from transformers import PreTrainedTokenizerBase

from akl_lightning.data.collate import IGNORE_INDEX, LEARNT, collate

if TYPE_CHECKING:
    from akl_lightning.data.samples import InstructionData

OPEN, CLOSE = "[[", "]]"
"""Stand around what is learnt, where there are no colours."""

STYLE = "bold green"


def pieces(row: Mapping[str, Any], tokenizer: PreTrainedTokenizerBase) -> Iterator[tuple[str, bool]]:
    """The text of a row in pieces, special tokens included, and whether each is learnt.

    Args:
        row: ``input_ids`` and ``spans`` of a tokenized split.
        tokenizer: which made the tokens.
    """
    ids = row["input_ids"]
    edges = [0, *row["spans"], len(ids)]
    for number, (start, end) in enumerate(pairwise(edges)):
        if start < end:
            text = str(tokenizer.decode(ids[start:end], clean_up_tokenization_spaces=False))
            yield _visible(text), number % 2 == 1


def title(split: str, number: int, count: int, row: Mapping[str, Any]) -> str:
    """Which sample it is, and how much of it is learnt."""
    turns = len(set(row["turns"]))
    of_turns = "" if row["form"] == "text" or not turns else f" in {turns} turn{'s' * (turns > 1)}"
    where = f"{Path(row['file']).name}, line {row['line']}" if row["file"] else row["name"]
    learnt = f"{row['learnt']:,} learnt{of_turns}" if row["learnt"] else "a prompt alone, nothing learnt"
    return f"{split} {number + 1:,} of {count:,} ({where}, {row['form']}): {row['length']:,} tokens, {learnt}"


def summary(data: "InstructionData") -> str:
    """Three lines on what is trained on: how many samples, and the first of them."""
    sizes = ", ".join(f"{len(rows):,} {split}" for split, rows in data.splits.items())
    row = data.splits["train"][0]
    text = "".join(
        f"{OPEN}{_short(piece)}{CLOSE}" if learnt else _short(piece) for piece, learnt in pieces(row, data.tokenizer)
    )
    return (
        f"Data: {sizes} samples; template {_short(data.template)!r}, {data.chat.learn} learnt, at most "
        f"{data.max_length:,} tokens\n"
        f"{title('train', 0, len(data.splits['train']), row)}, between {OPEN} and {CLOSE}:\n"
        f"{_short(text, 240)}"
    )


def show(data: "InstructionData", split: str, samples: int, tokens: bool, console: Console | None = None) -> None:
    """Print samples, spread over a split.

    Args:
        data: set up.
        split: which one.
        samples: how many.
        tokens: print ids and labels as well.
        console: where to; the standard output if it is not given.
    """
    console = console or Console(highlight=False)
    coloured = console.color_system is not None
    rows = data.splits[split]
    marked = "bold and green" if coloured else f"between {OPEN} and {CLOSE}"
    console.print(
        f"Template {_short(data.template)!r}, {data.chat.learn} learnt, at most {data.max_length:,} tokens; what is "
        f"learnt stands {marked}, spaces and special tokens as they are.",
        markup=False,
    )
    shown = min(samples, len(rows))
    for number in range(shown):
        index = number * len(rows) // shown
        row = rows[index]
        console.print()
        console.print(title(split, index, len(rows), row), style="bold", markup=False)
        text = Text()
        for piece, learnt in pieces(row, data.tokenizer):
            if coloured:
                text.append(piece, STYLE if learnt else None)
            else:
                text.append(f"{OPEN}{piece}{CLOSE}" if learnt else piece)
        console.print(text)
        if row["references"]:
            console.print(f"({len(row['references'])} acceptable responses, the first is learnt)", markup=False)
        if tokens:
            console.print(_table(row, data.tokenizer, coloured))


def _table(row: Mapping[str, Any], tokenizer: PreTrainedTokenizerBase, coloured: bool) -> Table:
    table = Table(box=None, pad_edge=False)
    for name in ("place", "id", "label", "turn"):
        table.add_column(name, justify="right")
    table.add_column("token")
    batch = collate([{**{name: row[name] for name in LEARNT}, "index": 0}], 0)
    labels, turns = batch["labels"][0].tolist(), batch["turn"][0].tolist()
    for place, (token, label, turn) in enumerate(zip(row["input_ids"], labels, turns, strict=True)):
        learnt = label != IGNORE_INDEX
        text = Text(repr(tokenizer.decode([token], clean_up_tokenization_spaces=False)))
        style = STYLE if learnt and coloured else None
        table.add_row(str(place), str(token), str(label), str(turn) if learnt else "", text, style=style)
    return table


def _visible(text: str) -> str:
    """Without characters that would move the cursor or do nothing."""
    return "".join(
        character if character in "\n\t" or unicodedata.category(character) != "Cc" else ascii(character)[1:-1]
        for character in text
    )


def _short(text: str, length: int = 60) -> str:
    """A text on one line, without its middle if it is long."""
    text = text.replace("\n", "\\n")
    half = length // 2
    return text if len(text) <= length else f"{text[:half]} ... {text[-half:]}"
