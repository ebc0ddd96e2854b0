"""What becomes of samples that are longer than a row, by hand."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from lightning.pytorch import Trainer

from akl_lightning.criterion import DistillationCriterion
from akl_lightning.data.chat import Encoded
from akl_lightning.data.lengths import Fitted, Lengths, fit
from akl_lightning.data.module import InstructionDataModule
from akl_lightning.data.records import conversation, document
from akl_lightning.data.rendering import SampleError
from akl_lightning.data.sources import JsonLines
from akl_lightning.errors import UsageError
from akl_lightning.models.split import SplitModel
from akl_lightning.module import DistillationModule
from tests.conftest import QUIET, gpt2
from tests.data.test_module import said, write

BOS, SYSTEM, USER, ASSISTANT, END = 1, 2, 3, 4, 5


def encode(records: Sequence[Any]) -> list[Encoded | SampleError]:
    """A template of our own: a token for each role and each word, which is its number, and an end behind answers."""
    found: list[Encoded | SampleError] = []
    for record in records:
        if record["text"]:
            words = [int(word) for word in record["text"].split()]
            found.append(Encoded([BOS, *words, END], [(1, len(words) + 2)], [0]))
            continue
        messages = json.loads(record["messages"])
        ids, spans, starts, prompt = [BOS], [], [], []
        for index, message in enumerate(messages):
            role = {"system": SYSTEM, "user": USER, "assistant": ASSISTANT}[message["role"]]
            if role != SYSTEM and (not starts or (role == USER and messages[index - 1]["role"] == "assistant")):
                starts.append(len(ids))
            ids.append(role)
            if role == ASSISTANT:
                spans.append((len(ids), len(ids) + len(message["content"].split()) + 1))
                prompt = ids.copy()
            ids += [int(word) for word in message["content"].split()] + [END] * (role == ASSISTANT)
        if messages[-1]["role"] != "assistant":
            prompt, spans = [*ids, ASSISTANT], []
        if 666 in ids:
            found.append(SampleError("a, line 1: no devils."))
            continue
        found.append(Encoded([*ids, 9], spans, list(range(len(spans))), starts, f"{prompt}", prompt))
    return found


def fitted(*turns: str, system: str = "", **lengths: Any) -> Fitted:
    messages = [{"role": "system", "content": system}] * bool(system) + said(*turns)["messages"]
    (row,) = fit([conversation(messages, "messages", "a", 1)], encode, Lengths(**lengths))
    return row


def learnt(row: Fitted) -> list[list[int]]:
    return [row.input_ids[start:end] for start, end in row.spans]


CHAT = ("10 11", "12 13 14", "20", "21 22", "30", "31 32 33")
#  1 3 10 11 4 | 12 13 14 5 | 3 20 4 | 21 22 5 | 3 30 4 | 31 32 33 5: 5 + 4 + 3 + 3 + 3 + 4 = 22 tokens


def test_what_fits_is_left_as_it_is() -> None:
    row = fitted(*CHAT, max_length=22)
    assert row.input_ids == [1, 3, 10, 11, 4, 12, 13, 14, 5, 3, 20, 4, 21, 22, 5, 3, 30, 4, 31, 32, 33, 5], "without 9"
    assert learnt(row) == [[12, 13, 14, 5], [21, 22, 5], [31, 32, 33, 5]] and row.turns == [0, 1, 2]
    assert (row.note, row.whole, row.kept) == ("", 22, True)


def test_a_response_that_is_cut_learns_no_end() -> None:
    row = fitted(*CHAT, max_length=21)
    assert learnt(row)[-1] == [31, 32, 33] and row.note == "response" and row.whole == 22
    assert learnt(fitted(*CHAT, max_length=19))[-1] == [31]
    single = fitted("10", "11 12 13", max_length=5)
    assert (single.input_ids, learnt(single), single.note) == ([1, 3, 10, 4, 11], [[11]], "response")


def test_the_end_of_a_conversation_is_cut() -> None:
    """Whole turns first, so that the row's last turn is the one that its prompt asks for."""
    row = fitted(*CHAT, max_length=18)
    assert learnt(row) == [[12, 13, 14, 5], [21, 22, 5]] and row.input_ids[-1] == 5
    assert (row.note, row.whole, row.turns) == ("end", 22, [0, 1])
    assert [message["content"] for message in json.loads(row.record["messages"])] == list(CHAT[:4])
    assert row.prompt_ids == [1, 3, 10, 11, 4, 12, 13, 14, 5, 3, 20, 4]
    assert learnt(fitted(*CHAT, max_length=14)) == [[12, 13, 14, 5], [21, 22]]
    assert learnt(fitted(*CHAT, max_length=7)) == [[12, 13]]


def test_first_turns_are_left_out() -> None:
    row = fitted(*CHAT, system="7", max_length=16, truncate="start_turns")  # 24 in all, 8 of them the first turn
    assert row.input_ids == [1, 2, 7, 3, 20, 4, 21, 22, 5, 3, 30, 4, 31, 32, 33, 5], "behind the system's message"
    assert learnt(row) == [[21, 22, 5], [31, 32, 33, 5]] and row.turns == [0, 1]
    assert (row.note, row.whole) == ("start_turns", 24)
    row = fitted(*CHAT, system="7", max_length=15, truncate="start_turns")
    assert row.input_ids == [1, 2, 7, 3, 30, 4, 31, 32, 33, 5]
    row = fitted(*CHAT, max_length=6, truncate="start_turns")
    assert (row.input_ids, row.note) == ([1, 3, 30, 4, 31, 32], "start_turns"), (
        "and where the last alone is too long, cut"
    )
    assert not fitted(*CHAT, max_length=4, truncate="start_turns").kept
    row = fitted(*CHAT[:5], max_length=12, truncate="start_turns")  # ends with a question
    assert row.input_ids == row.prompt_ids == [1, 3, 20, 4, 21, 22, 5, 3, 30, 4] and not row.spans


def test_longer_ones_are_dropped() -> None:
    assert fitted(*CHAT, max_length=22, truncate="drop").kept
    row = fitted(*CHAT, max_length=21, truncate="drop")
    assert (row.kept, row.note, row.whole) == (False, "drop", 22)


@pytest.mark.parametrize("truncate", ["end", "start_turns", "drop"])
def test_prompts_are_never_cut(truncate: str) -> None:
    row = fitted("10 11 12", "13", max_length=6, truncate=truncate)
    assert (row.kept, row.note, row.whole) == (False, "prompt", 6)
    assert not fitted("10 11", "12 13", max_length=9, max_prompt_length=4, truncate=truncate).kept
    assert fitted("10 11", "12 13", max_length=9, max_prompt_length=5, truncate=truncate).kept
    alone = fitted("10 11 12", max_length=6, truncate=truncate)
    assert (alone.kept, alone.note) == (False, "prompt")


def test_a_prompt_is_bounded_by_leaving_out_first_turns() -> None:
    row = fitted(*CHAT, max_length=22, max_prompt_length=4, truncate="start_turns")
    assert row.input_ids == [1, 3, 30, 4, 31, 32, 33, 5] and len(row.prompt_ids) == 4


def test_what_the_template_refuses() -> None:
    row = fitted("666", "10", max_length=9)
    assert (row.kept, row.note) == (False, "a, line 1: no devils.")


@settings(max_examples=100, deadline=None)
@given(st.integers(1, 40), st.integers(2, 12))
def test_every_token_of_a_document_is_learnt_once(words: int, max_length: int) -> None:
    text = list(range(100, 100 + words))
    rows = fit([document(" ".join(map(str, text)), "a", 1)], encode, Lengths(max_length))
    assert [token for row in rows for tokens in learnt(row) for token in tokens] == [*text, END]
    assert all(len(row.input_ids) <= max_length and row.spans == [(1, len(row.input_ids))] for row in rows)
    whole = [BOS, *text, END]
    starts = [whole.index(row.input_ids[0]) for row in rows]
    assert [row.input_ids for row in rows] == [whole[start : start + max_length] for start in starts]
    assert all(row.record["text"] == "" and row.whole == words + 2 for row in rows)
    assert {row.note for row in rows} == {"block" if words + 2 > max_length else ""}


@settings(max_examples=150, deadline=None)
@given(st.lists(st.integers(1, 9), min_size=1, max_size=9), st.integers(2, 40), st.sampled_from(["end", "start_turns"]))
def test_rows_fit_and_hold_what_the_template_writes(sizes: list[int], max_length: int, truncate: str) -> None:
    turns = [" ".join(str(100 * turn + word) for word in range(1, size + 1)) for turn, size in enumerate(sizes, 1)]
    row = fitted(*turns, system="7", max_length=max_length, truncate=truncate)
    if not row.kept:
        return
    assert len(row.input_ids) <= max_length and len(row.prompt_ids) < max_length
    (anew,) = encode([row.record])
    assert row.input_ids == (anew.input_ids if row.spans else anew.prompt_ids)[: len(row.input_ids)]
    assert row.prompt_ids == anew.prompt_ids and row.turns == anew.turns, "the last turn is the one that is asked for"
    whole = [end for start, end in anew.spans][-1:]
    assert whole in ([], [len(row.input_ids)]) or len(row.input_ids) == max_length, "no more is cut than must be"


# --------------------------------------------------------------------------------------------------------------------
# Through the data module


def data_of(tokenizer, path: str, **settings: Any) -> InstructionDataModule:
    data = InstructionDataModule(tokenizer, JsonLines(path), **{"validation_size": 0, "test_size": 0, **settings})
    data.setup("fit")
    return data


def test_what_is_cut_is_said_once_a_split(tokenizer, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    records = [
        {"instruction": "short", "output": "word " * 50},
        {"instruction": "long " * 50, "output": "one"},
        {"instruction": "other", "output": "one"},
        said("one", "two", "three " * 20, "four"),
        {"text": "one two three four " * 20},
    ]
    path = write(tmp_path / "a.jsonl", *records)
    longest = data_of(tokenizer, path).splits["train"]["length"]

    def heard(**settings: Any) -> list[str]:
        caplog.clear()
        with caplog.at_level("INFO", "lightning.pytorch.utilities.rank_zero"):
            data = data_of(tokenizer, path, **settings)
        assert max(data.splits["train"]["length"]) <= 20
        return [record.getMessage() for record in caplog.records if record.getMessage().startswith("train: ")]

    end = heard(max_length=20)
    prompt = len(tokenizer("long " * 50 + "\n")["input_ids"])
    blocks = -(-(longest[4] - 1) // 19)
    assert end == [
        f"train: 1 of 1 documents cut into {blocks} blocks of 20 tokens",
        f"train: 1 of 4 responses cut at 20 tokens, the longest has {longest[0]}: raise data.max_length",
        f"train: 1 of 4 conversations cut at 20 tokens, of which they keep the first turns, the longest has "
        f"{longest[3]}: "
        "raise data.max_length, or set data.truncate to start_turns to keep the last",
        f"train: 1 of 5 samples dropped, their prompts are longer than 19 tokens, the longest has {prompt}: raise "
        "data.max_length",
    ]
    assert heard(max_length=20) == end, "also of rows that were found again"
    assert any(
        "samples dropped, they are longer than 20 tokens" in line for line in heard(max_length=20, truncate="drop")
    )


def test_only_dropped_samples_are_one_sentence(tokenizer, tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", {"instruction": "Say", "output": "word " * 50}, said("one", "two " * 90))
    with pytest.raises(
        UsageError, match=r"no usable train sample left of 2: raise data.max_length, the shortest has \d+"
    ):
        data_of(tokenizer, path, max_length=20, truncate="drop")


def test_the_messages_of_a_row_are_those_that_are_left(tokenizer, tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", said("one " * 9, "two", "three", "four", "five", "six"))
    (row,) = data_of(tokenizer, path, max_length=12, truncate="start_turns").splits["train"]
    assert [message["content"] for message in json.loads(row["messages"])] == ["five", "six"]
    assert tokenizer.decode(row["input_ids"]) == "five\nsix<|endoftext|>"


@pytest.mark.parametrize("packing", [False, True])
def test_packed_rows_give_the_same_hidden_states(tokenizer, tmp_path: Path, packing: bool) -> None:
    """Conversations, blocks of documents, prompts alone, and a filler, in one batch."""
    records = [said("one", "two", "three", "four five"), {"text": "six seven eight " * 9}, {"prompt": "Say one"}]
    records += [{"instruction": "Say two", "output": "two"}]
    path = write(tmp_path / "a.jsonl", *records)
    data = InstructionDataModule(tokenizer, JsonLines(path, path), max_length=24, test_size=0, batch_size=9)
    data.setup("fit")
    batch = next(iter(data.val_dataloader()))
    criterion = DistillationCriterion()
    torch.manual_seed(0)
    student, teacher = gpt2().eval(), gpt2(24).eval()
    positions, labels = criterion.response_positions(batch["labels"])
    one = SplitModel(student, packing=packing)(batch, positions).logits()
    alone = torch.cat([student(input_ids=row[None]).logits[0] for row in batch["input_ids"]])[positions]
    assert torch.allclose(one, alone, atol=1e-5)
    assert len(labels) == sum(data.splits["validation"]["learnt"])
    trainer = Trainer(**QUIET, max_steps=2)
    trainer.fit(DistillationModule(student, teacher, packing=packing), data)
    assert trainer.callback_metrics["val/loss"].isfinite()
