import copy
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
from lightning.pytorch import Trainer

from akl_lightning.data.module import InstructionDataModule
from akl_lightning.data.sources import HubDataset, JsonLines
from akl_lightning.errors import UsageError
from akl_lightning.module import DistillationModule
from tests.conftest import PAIRS, QUIET, gpt2
from tests.data.tokenizers import CHATML


def write(path: Path, *lines: object) -> str:
    path.write_text("".join((line if isinstance(line, str) else json.dumps(line)) + "\n" for line in lines))
    return str(path)


def said(*turns: str) -> dict[str, Any]:
    """A conversation of these turns, a question first."""
    roles = ("user", "assistant")
    return {"messages": [{"role": roles[number % 2], "content": turn} for number, turn in enumerate(turns)]}


def test_batches(tokenizer, corpus: str) -> None:
    data = InstructionDataModule(tokenizer, JsonLines(corpus), batch_size=4, max_length=40)
    data.setup("fit")
    assert {split: len(rows) for split, rows in data.splits.items()} == {"train": 32, "validation": 2, "test": 2}
    seen = 0
    for batch in data.train_dataloader():
        assert set(batch) == {"input_ids", "attention_mask", "labels", "turn", "index"}
        assert batch["input_ids"].shape == batch["attention_mask"].shape == batch["labels"].shape
        assert batch["attention_mask"].sum(-1).max() == batch["input_ids"].shape[1], "padded to the longest member"
        assert torch.equal(batch["turn"] == 0, batch["labels"] != -100) and batch["turn"].max() == 0
        for ids, mask, labels, _, index in zip(*batch.values(), strict=True):
            assert (
                data.splits["train"][index.item()]["prompt_ids"]
                == ids[: (labels == -100).logical_and(mask).sum()].tolist()
            )
            ids, labels = ids[mask.bool()], labels[mask.bool()]
            response = labels != -100
            text = tokenizer.decode(ids[~response])
            assert text.startswith("Say ") and text.endswith("\n"), "the prompt is masked"
            assert torch.equal(labels[response], ids[response])
            assert ids[-1] == tokenizer.eos_token_id or len(ids) == 40
        seen += len(batch["input_ids"])
    assert seen == 32


def test_single_turns_have_the_tokens_of_earlier_versions(tokenizer, corpus: str) -> None:
    """By which caches of teachers are kept, and go on."""
    data = InstructionDataModule(tokenizer, JsonLines(corpus), max_length=30, validation_size=0, test_size=0)
    data.setup("fit")
    rows = data.splits["train"]
    for pair, row in zip(PAIRS, rows, strict=True):
        prompt = tokenizer(pair["instruction"] + "\n")["input_ids"]
        response = [*tokenizer(pair["output"], add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]
        whole = [*prompt, *response][:30]
        assert (row["input_ids"], row["spans"]) == (whole, [len(prompt), len(whole)])
        assert (row["prompt_ids"], row["prompt"]) == (prompt, pair["instruction"] + "\n")
        assert (row["length"], row["prompt_length"], row["learnt"]) == (
            len(whole),
            len(prompt),
            len(whole) - len(prompt),
        )


def test_each_thing_is_said_once(tokenizer, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Also where the data are read before the models, which then turn out to have fewer positions."""
    tools = [{"type": "function", "function": {"name": "f", "parameters": {}}}]
    records = [said("one", "two " * 90, "three", "four"), {**said("five", "six"), "tools": tools}]
    records += [said("one", "two " * 2000), {"instruction": "seven", "output": 8}, {"text": "nine"}]
    paths = [write(tmp_path / f"{name}.jsonl", *records) for name in ("train", "validation")]
    before, data = (
        InstructionDataModule(tokenizer, JsonLines(*paths), test_size=0, template="{{ eos_token }}" + CHATML)
        for _ in range(2)
    )
    with caplog.at_level("INFO", "lightning.pytorch.utilities.rank_zero"):
        before.setup("fit")
        data.go_on_from(before)
        Trainer(**QUIET, max_steps=1).fit(DistillationModule(gpt2(), gpt2(24)), data)
    heard = [record.getMessage() for record in caplog.records]
    assert data.max_length == 64 and max(data.splits["train"]["length"]) <= 64
    for line in (
        "records have a number or boolean",
        "samples have tools",
        "at 1,024 tokens",
        "at 64 tokens",
        "is 64 inst",
    ):
        assert sum(line in one for one in heard) == len({one for one in heard if line in one}) >= 1, line
    assert sorted(heard) == sorted(set(heard))


def test_prompts_are_padded_on_the_left(tokenizer, corpus: str) -> None:
    data = InstructionDataModule(tokenizer, JsonLines(corpus), batch_size=4, test_size=8)
    data.setup("predict")
    batch = next(iter(data.predict_dataloader()))
    assert batch["attention_mask"][:, -1].all()
    row = data.splits["test"][batch["index"][0].item()]
    assert tokenizer.decode(batch["input_ids"][0], skip_special_tokens=True) == row["prompt"]


def test_turns_of_a_conversation_in_a_batch(tokenizer, tmp_path: Path) -> None:
    path = write(
        tmp_path / "a.jsonl", said("one", "two", "three", "four five"), {"instruction": "six", "output": "one"}
    )
    data = InstructionDataModule(tokenizer, JsonLines(path), batch_size=2, validation_size=0, test_size=0)
    data.setup("fit")
    batch = next(iter(data.train_dataloader()))
    row = batch["index"].tolist().index(0)
    for turn, text in enumerate(("two", "four five")):
        of_turn = batch["turn"][row] == turn
        assert tokenizer.decode(batch["labels"][row][of_turn]).removesuffix("<|endoftext|>") == text
    assert torch.equal(batch["turn"] >= 0, batch["labels"] != -100)
    assert batch["turn"][batch["attention_mask"] == 0].eq(-1).all()


def test_prompts_alone(tokenizer, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """They are trained on only for those who want them, and in validation disturb no mean."""
    records = [said("one", "two"), {"prompt": "Say three"}, said("four", "five six"), said("one", "two", "seven")]
    path = write(tmp_path / "a.jsonl", *records)
    data = InstructionDataModule(tokenizer, JsonLines(path, path), batch_size=1, test_size=0, group_by_length=False)
    data.setup("fit")
    with caplog.at_level("INFO", "lightning.pytorch.utilities.rank_zero"):
        assert sorted(batch["index"].item() for batch in data.train_dataloader()) == [0, 1]
    assert "train: 2 of 4 samples are prompts alone and left out, nothing is to be learnt of them" in caplog.text
    rows = data.splits["train"]
    assert [row["form"] for row in rows] == ["messages", "messages", "prompt", "messages"], "those to learn from first"
    assert rows[2]["prompt"] == "Say three\n" and rows[2]["input_ids"] == rows[2]["prompt_ids"]
    data.prompts_alone = True
    assert sorted(batch["index"].item() for batch in data.train_dataloader()) == [0, 1, 2, 3]

    module, trainer = DistillationModule(gpt2(), gpt2(24), max_new_tokens=2), Trainer(**QUIET)
    (mixed,) = trainer.validate(module, data, verbose=False)
    only = InstructionDataModule(
        tokenizer, JsonLines(path, write(tmp_path / "b.jsonl", records[0], records[2])), batch_size=2, test_size=0
    )
    (means,) = trainer.validate(module, only, verbose=False)
    assert mixed == pytest.approx(means, rel=1e-5) and means["val/loss"] > 0

    alone = InstructionDataModule(tokenizer, JsonLines(write(tmp_path / "c.jsonl", records[1])), test_size=0)
    alone.validation_size = 0
    with pytest.raises(
        UsageError, match="gives train prompts alone, nothing is to be learnt of them: give samples with"
    ):
        alone.setup("fit")
    alone.prompts_alone = True
    alone.setup("fit")


def test_a_document_is_learnt_from_but_not_answered(
    tokenizer, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = write(tmp_path / "t.jsonl", {"text": "one two three four"}, {"instruction": "Say one", "output": "one"})
    data = InstructionDataModule(tokenizer, JsonLines(test_path=path), batch_size=4)
    with caplog.at_level("INFO", "lightning.pytorch.utilities.rank_zero"):
        data.setup("predict")
        assert [batch["index"].tolist() for batch in data.predict_dataloader()] == [[1]]
    assert "test: 1 of 2 samples have no prompt to answer and are left out" in caplog.text
    (batch,) = data.test_dataloader()
    assert sorted(batch["index"].tolist()) == [0, 1]
    data = InstructionDataModule(tokenizer, JsonLines(test_path=write(tmp_path / "u.jsonl", {"text": "one two"})))
    data.setup("predict")
    with pytest.raises(UsageError, match="JsonLines gives no test prompts to answer"):
        data.predict_dataloader()


def test_a_length_that_nobody_has_set_is_that_of_the_models(tokenizer, corpus: str) -> None:
    trainer = Trainer(**QUIET, max_steps=1)
    data = InstructionDataModule(tokenizer, JsonLines(corpus))
    assert data.max_length == 1024
    trainer.fit(DistillationModule(gpt2(positions=20), gpt2(24, positions=32)), data)
    assert data.max_length == max(data.splits["train"]["length"]) == 20
    with pytest.raises(UsageError, match=r"data\.max_length = 21 is beyond the 20 positions of the student: set it to"):
        trainer.fit(
            DistillationModule(gpt2(positions=20), gpt2(24, positions=32)),
            InstructionDataModule(tokenizer, JsonLines(corpus), max_length=21),
        )


@pytest.mark.parametrize(
    ("template", "reason"),
    [
        ("{{ raise_exception('roles must alternate') }}", "roles must alternate"),
        ("{% for m in messages %}{{ m.content }}", "Unexpected end of template"),
        ("{{ nothing.at_all }}", "'nothing' is undefined"),
    ],
)
def test_a_chat_template_that_fails_is_one_sentence(tokenizer, corpus: str, template: str, reason: str) -> None:
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.chat_template = template
    with pytest.raises(UsageError, match=rf"chat template .*{reason}"):
        InstructionDataModule(tokenizer, JsonLines(corpus))


def test_a_sample_that_the_template_refuses_is_dropped_by_name(
    tokenizer, corpus: str, caplog: pytest.LogCaptureFixture
) -> None:
    tokenizer = copy.deepcopy(tokenizer)
    template = "{% if 'two' in messages[0].content %}{{ raise_exception('no twos') }}{% endif %}"
    template += "{% for m in messages %}{{ m.content }}{{ eos_token if m.role == 'assistant' else '\n' }}{% endfor %}"
    tokenizer.chat_template = template
    data = InstructionDataModule(tokenizer, JsonLines(corpus), validation_size=0, test_size=0)
    with caplog.at_level("INFO", "lightning.pytorch.utilities.rank_zero"):
        data.setup("fit")
    assert len(data.splits["train"]) == 33
    assert "train: 3 of 36 samples dropped, the first for " in caplog.text
    assert "pairs.jsonl, line 2: the tokenizer's chat template fails on the prompt 'Say two 1' (no twos)" in caplog.text
    tokenizer.chat_template = template.replace("'two'", "'Say'")
    data = InstructionDataModule(tokenizer, JsonLines(corpus), validation_size=0, test_size=0)
    with pytest.raises(UsageError, match=r"no usable train sample left of 36: .*line 1: .*'Say one 0' \(no twos\)"):
        data.setup("fit")


def test_the_template_is_the_tokenizers_own_where_it_has_one(tokenizer, corpus: str) -> None:
    with pytest.raises(UsageError, match="no chat template"):
        InstructionDataModule(tokenizer, JsonLines(corpus), template="chat")
    assert InstructionDataModule(tokenizer, JsonLines(corpus)).template == "plain"
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.chat_template = (
        "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% if m.role == 'assistant' %}<|endoftext|>{% endif %}"
        "{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"
    )
    data = InstructionDataModule(tokenizer, JsonLines(corpus))
    data.setup("fit")
    assert data.template == "chat"
    assert data.splits["train"][0]["prompt"].startswith("<user>Say ")
    assert data.splits["train"][0]["prompt"].endswith("<assistant>")


def test_a_cache_that_cannot_be_made_is_one_sentence(
    tokenizer, corpus: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "file/cache"))
    with pytest.raises(UsageError, match=r"cannot write to .*akl_lightning.*: Not a directory; choose another folder"):
        InstructionDataModule(tokenizer, JsonLines(corpus)).setup("fit")


def test_other_bad_input(tokenizer, corpus: str, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"there is no file .*gone\.jsonl"):
        InstructionDataModule(tokenizer, JsonLines(str(tmp_path / "gone.jsonl"))).setup("fit")
    with pytest.raises(UsageError, match=r"cannot load the data set 'nobody/nothing'.*local folder"):
        InstructionDataModule(tokenizer, HubDataset("nobody/nothing")).setup("fit")
    with pytest.raises(UsageError, match=r"cannot load the tokenizer 'nobody/nothing'.*local folder"):
        InstructionDataModule("nobody/nothing")
    with pytest.raises(UsageError, match="unknown prompt template 'vicuna'"):
        InstructionDataModule(tokenizer, template="vicuna")
    with pytest.raises(UsageError, match="batch_size must be 1 or more"):
        InstructionDataModule(tokenizer, batch_size=0)
    with pytest.raises(UsageError, match="max_length must be 2 or more"):
        InstructionDataModule(tokenizer, max_length=1)
    for bound, settings in (("max_prompt_length", {"max_prompt_length": 1}), ("max_length", {"max_length": 2})):
        data = InstructionDataModule(tokenizer, JsonLines(corpus), **settings)
        with pytest.raises(UsageError, match=rf"longer than 1 tokens; raise data.{bound}, the shortest has \d+\."):
            data.setup("fit")


@pytest.mark.parametrize(
    ("setting", "value"),
    [("validation_size", -1), ("test_size", -0.1), ("validation_size", float("nan")), ("num_workers", -1)],
)
def test_sizes_below_zero_are_refused_before_any_work(tokenizer, corpus: str, setting: str, value: float) -> None:
    with pytest.raises(UsageError, match=rf"data\.{setting} must be .*0 or more, got {value}"):
        InstructionDataModule(tokenizer, JsonLines(corpus), **{setting: value})


FIND = """
import sys

from akl_lightning.data.module import InstructionDataModule
from akl_lightning.data.sources import JsonLines

data = InstructionDataModule(sys.argv[1], JsonLines(sys.argv[2]), max_length=40)


def refuse(*arguments, **settings):
    raise AssertionError("tokenized anew")


type(data.tokenizer).__call__ = refuse
data.setup("fit")
print([data.splits[split][:][column] for split in data.splits for column in ("input_ids", "spans", "prompt_ids")])
"""


def tokens(data: InstructionDataModule) -> list[list[list[int]]]:
    return [data.splits[split][:][column] for split in data.splits for column in ("input_ids", "spans", "prompt_ids")]


def test_another_process_finds_the_tokens(
    tokenizer_folder: str, corpus: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))

    def tokenize(max_length: int) -> list[list[list[int]]]:
        data = InstructionDataModule(tokenizer_folder, JsonLines(corpus), max_length=max_length)
        # What a call leaves in the tokenizer is of no account.
        data.tokenizer(["one", "one two three"], padding=True, truncation=True, max_length=2)
        data.setup("fit")
        return tokens(data)

    first = tokenize(40)
    assert tokenize(12) != first, "other tokens, other files"
    files = sorted((tmp_path / "cache/akl_lightning").glob("*.arrow"))
    assert len(files) == 6
    command = [sys.executable, "-c", FIND, tokenizer_folder, corpus]
    environment = {**os.environ, "HF_DATASETS_CACHE": str(tmp_path / "cache")}
    result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr[-2000:]
    assert result.stdout.strip().splitlines()[-1] == str(first)
    assert sorted((tmp_path / "cache/akl_lightning").glob("*.arrow")) == files


def test_processes_that_tokenize_give_the_tokens_of_one(
    tokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pairs = [{"instruction": f"Say {number}", "output": f"{number} yes"} for number in range(2400)]
    source = JsonLines(write(tmp_path / "many.jsonl", *pairs))
    results = []
    for folder, workers in (("one", 0), ("two", 2), ("two", 0)):
        monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / folder))
        data = InstructionDataModule(tokenizer, source, num_workers=workers)
        data.setup("fit")
        results.append(tokens(data))
    assert results[0] == results[1] == results[2]
    # The third has found what the second's two processes have written.
    assert len([path for path in (tmp_path / "two").rglob("*.arrow") if "_of_00002" in path.name]) == 2
    assert len(list((tmp_path / "two/akl_lightning").glob("*.arrow"))) == 4


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_batches_for_a_gpu_lie_in_pinned_memory(tokenizer, corpus: str) -> None:
    data = InstructionDataModule(tokenizer, JsonLines(corpus))
    data.trainer = Trainer(accelerator="gpu", devices=1, logger=False)
    data.setup("fit")
    assert next(iter(data.train_dataloader()))["input_ids"].is_pinned()
