import copy
import json
import os
import subprocess
import sys
from pathlib import Path

import datasets
import pytest
import torch
from lightning.pytorch import Trainer

from akl_lightning.data.chat import render
from akl_lightning.data.module import InstructionDataModule, split_pairs
from akl_lightning.data.sources import Docstrings, HubDataset, JsonLines, Pair, PaperTestSet
from akl_lightning.errors import UsageError


def write(path: Path, *lines: object) -> str:
    path.write_text("".join((line if isinstance(line, str) else json.dumps(line)) + "\n" for line in lines))
    return str(path)


def test_batches(tokenizer, corpus: str) -> None:
    data = InstructionDataModule(tokenizer, JsonLines(corpus), batch_size=4, max_length=40)
    data.setup("fit")
    assert {split: len(rows) for split, rows in data.splits.items()} == {"train": 32, "validation": 2, "test": 2}
    seen = 0
    for batch in data.train_dataloader():
        assert set(batch) == {"input_ids", "attention_mask", "labels", "index"}
        assert batch["input_ids"].shape == batch["attention_mask"].shape == batch["labels"].shape
        assert batch["attention_mask"].sum(-1).max() == batch["input_ids"].shape[1], "padded to the longest member"
        for ids, mask, labels, index in zip(*batch.values(), strict=True):
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


def test_prompts_are_padded_on_the_left(tokenizer, corpus: str) -> None:
    data = InstructionDataModule(tokenizer, JsonLines(corpus), batch_size=4, test_size=8)
    data.setup("predict")
    batch = next(iter(data.predict_dataloader()))
    assert batch["attention_mask"][:, -1].all()
    row = data.splits["test"][batch["index"][0].item()]
    assert tokenizer.decode(batch["input_ids"][0], skip_special_tokens=True) == row["prompt"]


def test_long_prompts_are_dropped_and_long_responses_cut(tokenizer, tmp_path: Path) -> None:
    path = write(
        tmp_path / "a.jsonl",
        {"instruction": "short", "output": "word " * 50},
        {"instruction": "long " * 50, "output": "x"},
        {"instruction": "other", "output": "x"},
    )
    data = InstructionDataModule(tokenizer, JsonLines(path), max_length=20, validation_size=0, test_size=0)
    data.setup("fit")
    assert sorted(data.splits["train"]["instruction"]) == ["other", "short"]
    assert max(data.splits["train"]["length"]) == 20


@pytest.mark.parametrize(
    ("template", "reason"),
    [
        ("{{ raise_exception('roles must alternate') }}", "roles must alternate"),
        ("{% for m in messages %}{{ m.content }}", "Unexpected end of template"),
        ("{{ messages[0].content + 1 }}", "can only concatenate str"),
        ("{{ nothing.at_all }}", "'nothing' is undefined"),
    ],
)
def test_a_chat_template_that_fails_is_one_sentence(tokenizer, corpus: str, template: str, reason: str) -> None:
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.chat_template = template
    with pytest.raises(UsageError, match=rf"the tokenizer's chat template fails on the prompt 'Say one' \(.*{reason}"):
        InstructionDataModule(tokenizer, JsonLines(corpus), template="chat")
    tokenizer.chat_template = "{% if 'two' in messages[0].content %}{{ raise_exception('no twos') }}{% endif %}"
    with pytest.raises(UsageError, match=r"fails on the prompt 'Say two 1' \(no twos\)"):
        InstructionDataModule(tokenizer, JsonLines(corpus), template="chat").setup("fit")


def test_a_cache_that_cannot_be_made_is_one_sentence(
    tokenizer, corpus: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "file/cache"))
    with pytest.raises(UsageError, match=r"cannot write to .*akl_lightning: Not a directory; choose another folder"):
        InstructionDataModule(tokenizer, JsonLines(corpus)).setup("fit")


def test_chat_template(tokenizer, corpus: str) -> None:
    with pytest.raises(UsageError, match="no chat template"):
        InstructionDataModule(tokenizer, JsonLines(corpus), template="chat")
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.chat_template = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}<assistant>"
    data = InstructionDataModule(tokenizer, JsonLines(corpus), template="chat")
    data.setup("fit")
    assert data.splits["train"][0]["prompt"].startswith("<user>Say ")
    assert data.splits["train"][0]["prompt"].endswith("<assistant>")


def test_the_split_depends_on_names_alone() -> None:
    pairs = [Pair(f"i{n}", f"o{n}", name=f"n{n}") for n in range(100)]
    one = split_pairs({"train": pairs}, 0.1, 5)
    two = split_pairs({"train": pairs[::-1]}, 0.1, 5)
    assert {split: set(members) for split, members in one.items()} == {s: set(m) for s, m in two.items()}
    assert {split: len(members) for split, members in one.items()} == {"train": 85, "validation": 10, "test": 5}
    given = split_pairs({"train": pairs[:90], "validation": pairs[90:]}, 50, 0)
    assert len(given["train"]) == 90 and len(given["validation"]) == 10 and not given["test"]
    with pytest.raises(
        UsageError, match=r"leave none of 100 to train on: lower data.validation_size and data.test_size, here"
    ):
        split_pairs({"train": pairs}, 60, 40)


def test_docstrings_of_the_standard_library() -> None:
    pairs = {pair.name: pair for pair in Docstrings().load()["train"]}
    assert len(pairs) > 4000
    assert pairs["json.dumps"].instruction.startswith("def json.dumps(obj, *, skipkeys=False")
    assert pairs["json.dumps"].output == "Serialize ``obj`` to a JSON formatted ``str``."
    assert len({pair.output for pair in pairs.values()}) == len(pairs)
    # unittest is part of the library, the library's own tests are not
    assert "unittest.case.TestCase.assertEqual" in pairs
    assert not any(name.startswith("test.") or ".tests." in name or "site-packages" in name for name in pairs)


def test_docstrings_of_installed_packages() -> None:
    pairs = {pair.name: pair for pair in Docstrings(["filelock"]).load()["train"]}
    assert len(pairs) > 4000
    assert any(name.startswith("filelock.") for name in pairs)
    for wrong in ("no_such_package", "os.path", "six"):
        with pytest.raises(UsageError, match=f"there is no installed package '{wrong}'"):
            Docstrings([wrong]).load()


def test_test_sets(tmp_path: Path) -> None:
    rows = [{"instruction": "a", "output": ["b", "c"]}, {"instruction": "d", "input": "e", "output": ""}]
    path = write(tmp_path / "t.jsonl", *rows)
    several, none = JsonLines(test_path=path).load()["test"]
    assert several == Pair("a", "b", references=("b", "c"))
    assert none == Pair("d", "", "e")
    assert [pair.instruction for pair in JsonLines(path).load()["train"]] == ["a"], "nothing to learn of the other"
    with pytest.raises(UsageError, match="JsonLines needs a path"):
        JsonLines()
    with pytest.raises(UsageError, match=r"cannot fetch valid\.jsonl of the data set 'MiniLLM/Vicuna'.*test_path"):
        PaperTestSet("Vicuna").load()


def test_fields_named_by_the_user(tmp_path: Path) -> None:
    path = write(
        tmp_path / "a.jsonl", {"question": "q", "answer": "a"}, "", {"question": "q2", "answer": "a2", "input": "i"}
    )
    (one, two) = JsonLines(path, instruction="question", output="answer").load()["train"]
    assert (one.instruction, one.input, one.output) == ("q", "", "a")
    assert two.input == "i"


def test_local_datasets(tmp_path: Path) -> None:
    rows = datasets.Dataset.from_list([{"instruction": f"i{n}", "output": f"o{n}"} for n in range(5)])
    rows.save_to_disk(str(tmp_path / "one"))
    assert len(HubDataset(str(tmp_path / "one")).load()["train"]) == 5
    datasets.DatasetDict(train=rows, test=rows).save_to_disk(str(tmp_path / "two"))
    assert set(HubDataset(str(tmp_path / "two")).load()) == {"train", "test"}
    (tmp_path / "three").mkdir()
    rows.to_json(str(tmp_path / "three" / "raw.jsonl"))
    assert len(HubDataset(str(tmp_path / "three"), data_files="raw.jsonl").load()["train"]) == 5


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ([{"instruction": "a", "output": "b"}, '{"instruction": '], r"a\.jsonl, line 2 is no JSON"),
        (["[1]"], r"a\.jsonl, line 1 is no JSON object"),
        (['{"instruction": "\\ud800", "output": "b"}'], r"a\.jsonl, line 1 is no JSON in UTF-8 \(.*surrogates"),
        ([{"instruction": "a", "response": "b"}], r"line 1 has no field 'output', only instruction, response"),
        ([{"instruction": "a", "output": 3}], r"the field 'output' is no text but 3"),
        ([{"instruction": "a", "output": " "}], r"has no usable pair left among 1"),
        ([], r"has no usable pair left among 0"),
    ],
)
def test_bad_json_lines(tmp_path: Path, lines: list, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        JsonLines(write(tmp_path / "a.jsonl", *lines)).load()


def test_other_bad_input(tokenizer, corpus: str, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"there is no file .*gone\.jsonl"):
        JsonLines(str(tmp_path / "gone.jsonl")).load()
    with pytest.raises(UsageError, match=r"cannot load the data set 'nobody/nothing'.*local folder"):
        HubDataset("nobody/nothing").load()
    with pytest.raises(UsageError, match=r"cannot load the tokenizer 'nobody/nothing'.*local folder"):
        InstructionDataModule("nobody/nothing")
    with pytest.raises(UsageError, match="unknown prompt template 'vicuna'"):
        InstructionDataModule(tokenizer, template="vicuna")
    with pytest.raises(UsageError, match="batch_size must be 1 or more"):
        InstructionDataModule(tokenizer, batch_size=0)
    for bound, settings in (("max_prompt_length", {"max_prompt_length": 1}), ("max_length", {"max_length": 2})):
        data = InstructionDataModule(tokenizer, JsonLines(corpus), **settings)
        with pytest.raises(UsageError, match=rf"longer than 1 tokens; raise data.{bound}, the shortest has \d+\."):
            data.setup("fit")


def test_alpaca_template() -> None:
    assert render("alpaca", "Add.", "1 2").endswith("### Instruction:\nAdd.\n\n### Input:\n1 2\n\n### Response:\n")
    assert "### Input" not in render("alpaca", "Add.")
    assert render("Q: {instruction} {input}\nA:", "Add.", "1") == "Q: Add. 1\nA:"


@pytest.mark.parametrize(
    ("setting", "value"),
    [("validation_size", -1), ("test_size", -0.1), ("validation_size", float("nan")), ("num_workers", -1)],
)
def test_sizes_below_zero_are_refused_before_any_work(tokenizer, corpus: str, setting: str, value: float) -> None:
    with pytest.raises(UsageError, match=rf"data\.{setting} must be .*0 or more, got {value}"):
        InstructionDataModule(tokenizer, JsonLines(corpus), **{setting: value})
    if setting == "validation_size":
        with pytest.raises(UsageError, match=r"data\.validation_size must be a number"):
            split_pairs({"train": [Pair("a", "b")]}, value, 0)


FIND = """
import sys

from akl_lightning.data.module import InstructionDataModule
from akl_lightning.data.sources import JsonLines

data = InstructionDataModule(sys.argv[1], JsonLines(sys.argv[2]), max_length=40)


def refuse(*arguments, **settings):
    raise AssertionError("tokenized anew")


type(data.tokenizer).__call__ = refuse
data.setup("fit")
print([data.splits[split][:][column] for split in data.splits for column in ("prompt_ids", "response_ids")])
"""


def tokens(data: InstructionDataModule) -> list[list[list[int]]]:
    return [data.splits[split][:][column] for split in data.splits for column in ("prompt_ids", "response_ids")]


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
    files = sorted(tmp_path.rglob("*.arrow"))
    assert len(files) == 6
    command = [sys.executable, "-c", FIND, tokenizer_folder, corpus]
    environment = {**os.environ, "HF_DATASETS_CACHE": str(tmp_path / "cache")}
    result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr[-2000:]
    assert result.stdout.strip().splitlines()[-1] == str(first)
    assert sorted(tmp_path.rglob("*.arrow")) == files


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
    assert len(list((tmp_path / "two").rglob("*.arrow"))) == 4


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_batches_for_a_gpu_lie_in_pinned_memory(tokenizer, corpus: str) -> None:
    data = InstructionDataModule(tokenizer, JsonLines(corpus))
    data.trainer = Trainer(accelerator="gpu", devices=1, logger=False)
    data.setup("fit")
    assert next(iter(data.train_dataloader()))["input_ids"].is_pinned()
