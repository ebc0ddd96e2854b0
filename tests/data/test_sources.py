"""Files and data sets of every kind, whole and damaged; what is cached, mixed and held out."""

import codecs
import csv
import gzip
import hashlib
import json
import logging
import os
from collections import Counter
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import pytest
from jsonargparse import ArgumentParser

from akl_lightning.data import files, forms
from akl_lightning.data.records import Source, content_digest
from akl_lightning.data.sources import Docstrings, Files, HubDataset, JsonLines, Mixture, PaperTestSet
from akl_lightning.data.splits import split_records
from akl_lightning.data.store import RECORD_FEATURES
from akl_lightning.errors import UsageError

MIXED = [
    {"messages": [{"role": "user", "content": "a0"}, {"role": "assistant", "content": "b0"}]},
    {"conversations": [{"from": "human", "value": "a1"}, {"from": "gpt", "value": "b1"}], "tools": [{"name": "t"}]},
    {"instruction": "a2", "input": 0, "output": ["b2", "c2"]},
    {"text": "Ünï \u2028 code"},
    {"prompt": "a4"},
]
PAIRS = [{"instruction": f"a{n}", "output": f"b{n}"} for n in range(100)]


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache/akl_lightning/records"


def lines(*records: Any) -> bytes:
    return "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records).encode()


def write(path: Path, content: bytes) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(gzip.compress(content) if path.name.endswith(".gz") else content)
    return str(path)


def prompts(data: datasets.Dataset) -> list[str]:
    return [json.loads(row["messages"])[0]["content"] if row["messages"] else row["text"] for row in data]


# --------------------------------------------------------------------------------------------------------------------
# Kinds of files


@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.jsonl.gz", "a.json.gz", "a.JSON"])
@pytest.mark.parametrize("how", ["plain", "mark", "windows"])
def test_json_of_mixed_forms(name: str, how: str, tmp_path: Path) -> None:
    array = ".jsonl" not in name
    content = (json.dumps(MIXED, ensure_ascii=False, indent=1) + "\n").encode() if array else lines(*MIXED)
    if how == "windows":
        content = content.replace(b"\n", b"\r\n")
    path = write(tmp_path / name, (codecs.BOM_UTF8 if how == "mark" else b"") + content)
    data = Files(path).load()["train"]
    assert data.features == RECORD_FEATURES
    assert data["form"] == ["messages", "conversations", "instruction", "text", "prompt"]
    assert prompts(data) == ["a0", "a1", "a2", "Ünï \u2028 code", "a4"]
    assert data["references"] == [[], [], ["b2", "c2"], [], []] and data["tools"][1] == '[{"name":"t"}]'
    assert set(data["file"]) == {path}
    where = content.replace(b"\r", b"").decode().split("\n")
    for row, mark in zip(data, ("a0", "a1", "a2", "code", "a4"), strict=True):
        (holds,) = [number for number, line in enumerate(where, 1) if mark in line]
        assert row["line"] == (
            holds if not array else max(n for n, line in enumerate(where[:holds], 1) if line == " {")
        )


def test_lines_may_be_called_json(tmp_path: Path) -> None:
    assert prompts(Files(write(tmp_path / "a.json", lines(*PAIRS[:3]))).load()["train"]) == ["a0", "a1", "a2"]
    # What its earlier versions read as JSON Lines goes on.
    assert len(JsonLines(write(tmp_path / "pairs.txt", lines(*PAIRS))).load()["train"]) == 100
    with pytest.raises(
        UsageError, match=r"pairs\.txt is of no kind that can be read: give files that end with \.jsonl"
    ):
        Files(str(tmp_path / "pairs.txt")).load()


def test_an_array_longer_than_what_is_read_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    records = [{"instruction": f"a{n}", "output": 'x\\"]},[{"é' * n} for n in range(1, 60)]
    expected = [(record, n) for n, record in enumerate(records, 2)]
    path = tmp_path / "a.json"
    path.write_text("[\n" + ",\n".join(json.dumps(record, ensure_ascii=n % 2 == 0) for n, record in enumerate(records))
                    + "\n]\n")  # fmt: skip
    for chunk in (1, 7, 64, 2**20):
        monkeypatch.setattr(files, "_CHUNK", chunk)
        assert [(record, line) for record, line, _ in files.read_json(path)] == expected


def test_columns(tmp_path: Path) -> None:
    """Null columns of other forms, keys that a column's type gives to all, and no type that an earlier row decides."""
    empty = {"messages": None, "prompt": None, "completion": None, "score": 1.5}
    messages = [
        [*MIXED[0]["messages"], {"role": "user", "name": None}],
        [{"role": "user", "content": "a2", "name": "n"}],
    ]
    messages[0][2]["content"] = "c0"
    rows = [{"messages": messages[0]}, {"prompt": "a1", "completion": "b1"}, {"messages": messages[1]}]
    table = datasets.Dataset.from_list([{**empty, **row} for row in rows * 700]).data.table
    datasets.Dataset(table).to_parquet(tmp_path / "a.parquet")
    for name, opened in (("file.arrow", pa.ipc.new_file), ("stream.arrow", pa.ipc.new_stream)):
        with opened(str(tmp_path / name), table.schema) as stream:
            stream.write_table(table)
    for name in ("a.parquet", "file.arrow", "stream.arrow"):
        data = Files(str(tmp_path / name)).load()["train"]
        assert prompts(data) == ["a0", "a1", "a2"], "the others are there twice"
        assert data["line"] == [0, 1, 2] and data["form"] == ["messages", "prompt_completion", "messages"]
        assert "name" not in json.loads(data["messages"][0])[0] and json.loads(data["messages"][2])[0]["name"] == "n"


def test_csv(tmp_path: Path) -> None:
    long = "x" * 200_000
    rows = [["instruction", "input", "output"], ["a,0", "", 'say "b"\nor\nc'], ["a1", "007", "b1"], ["a2", "0", long]]
    with (tmp_path / "a.csv").open("w", newline="", encoding="utf-8-sig") as file:
        csv.writer(file).writerows(rows)
    data = Files(str(tmp_path / "a.csv")).load()["train"]
    said = [json.loads(messages) for messages in data["messages"]]
    assert said[0] == [{"role": "user", "content": "a,0"}, {"role": "assistant", "content": 'say "b"\nor\nc'}]
    assert said[1][0]["input"] == "007" and said[2][0]["input"] == "0" and said[2][1]["content"] == long
    assert data["line"] == [2, 5, 6]


def test_many_files(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    for number, name in enumerate(["b.jsonl", "a.jsonl", "deep/c.json", "deep/.hidden.jsonl", "deep/note.md"]):
        write(tmp_path / "in" / name, lines(PAIRS[number]))
    folder = str(tmp_path / "in")
    assert prompts(Files(folder).load()["train"]) == ["a1", "a0", "a2"]
    assert prompts(Files(f"{folder}/*.jsonl").load()["train"]) == ["a1", "a0"]
    assert prompts(Files(f"{folder}/**/*.json").load()["train"]) == ["a2"]
    assert prompts(Files([f"{folder}/b.jsonl", f"{folder}/deep", f"{folder}/b.jsonl"]).load()["train"]) == ["a0", "a2"]
    # A file that is given as a test is not trained on, nor one that a folder's name for it says.
    loaded = Files(folder, test_path=f"{folder}/a.jsonl").load()
    assert prompts(loaded["train"]) == ["a0", "a2"] and prompts(loaded["test"]) == ["a1"]
    write(tmp_path / "in/my-test.jsonl", lines(PAIRS[5]))
    write(tmp_path / "in/valid_00.jsonl", lines(PAIRS[6]))
    write(tmp_path / "in/contest.jsonl", lines(PAIRS[7]))
    loaded = Files(folder).load()
    assert {split: prompts(data) for split, data in loaded.items()} == {
        "train": ["a1", "a0", "a7", "a2"], "validation": ["a6"], "test": ["a5"]
    }  # fmt: skip
    assert "my-test.jsonl by name: test records" in caplog.text
    with pytest.raises(UsageError, match="no file is left to train on"):
        Files(f"{folder}/a*.jsonl", test_path=f"{folder}/a.jsonl").load()
    assert len(Files(f"{folder}/a.jsonl", test_path=f"{folder}/a.jsonl").load()) == 2, "who asks for it, gets it"


def test_settings_on_a_command_line(tmp_path: Path) -> None:
    parser = ArgumentParser()
    parser.add_subclass_arguments(Source, "source")
    write(tmp_path / "a.jsonl", lines(*PAIRS[:2]))
    write(tmp_path / "b.jsonl", lines(*PAIRS[2:4]))

    def load(*arguments: str) -> list[str]:
        return prompts(parser.instantiate(parser.parse_args(arguments)).source.load()["train"])

    one, two = str(tmp_path / "a.jsonl"), str(tmp_path / "b.jsonl")
    assert load("--source", "JsonLines", "--source.path", one) == ["a0", "a1"]
    assert load("--source", "Files", "--source.path", f"[{one}, {two}]") == ["a0", "a1", "a2", "a3"]
    mixture = [{"class_path": "Files", "init_args": {"path": path}} for path in (one, two)]
    given = {"class_path": "Mixture", "init_args": {"sources": mixture}}
    assert load("--source", json.dumps(given)) == ["a0", "a1", "a2", "a3"]
    # The name that configurations of earlier versions have.
    earlier = parser.parse_args(["--source", "akl_lightning.data.sources.Docstrings"])
    assert isinstance(parser.instantiate(earlier).source, Docstrings)


# --------------------------------------------------------------------------------------------------------------------
# What is damaged

PAIR = b'{"instruction": "a", "output": "b"}\n'


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", PAIR + b'{"instruction": ', r"a\.jsonl, line 2 is no JSON in UTF-8 \(.*mend or remove the line"),
        ("a.jsonl", PAIR + b"[1]", r"line 2 is no JSON object but '\[1\]': mend or remove the line\."),
        ("a.jsonl", b"[" + PAIR.strip() + b"]", r"line 1 is no JSON object but .*; a file that is one array ends with"),
        ("a.jsonl", b"[\n" + PAIR + b"]", r"line 1 is no JSON in UTF-8 \(.*or the file ends with \.json"),
        ("a.jsonl", b"17\n", "line 1 is no JSON object but '17'"),
        ("a.jsonl", PAIR.decode().encode("utf-16"), "line 1 is no JSON in UTF-8 but UTF-16 or UTF-32"),
        ("a.jsonl", PAIR.decode().encode("utf-16-le"), "line 1 is no JSON in UTF-8 but UTF-16 or UTF-32:"),
        ("a.jsonl", PAIR + b'{"instruction": "\xff", "output": "b"}', r"line 2 is no JSON in UTF-8 \('utf-8' codec"),
        ("a.jsonl", PAIR + b'{"instruction": "a", "output": "\\ud800"}', r"line 2 is no JSON in UTF-8 \(.*surrogates"),
        ("a.jsonl", b"", r"a\.jsonl is empty: write records into it"),
        ("a.jsonl", b"\n\n", "has no usable record left among 0"),
        ("a.jsonl", b'{"instruction": "a", "output": " "}', "has no usable record left among 1"),
        ("a.jsonl", PAIR + b'{"question": "a"}', "line 2 fits no form, its fields are question"),
        ("a.json", b"[" + PAIR, r"a\.json, line 2 is no JSON in UTF-8 \(it ends early\): mend the array"),
        ("a.json", b"[" + PAIR + b',{"instruction": "a', r"line 2 is no JSON in UTF-8 \(Unterminated string"),
        ("a.json", b"[" + PAIR + b"] 1", r"line 2 is no JSON in UTF-8 \('1' stands behind the array\)"),
        ("a.json", b"[" + PAIR + PAIR + b"]", r"line 2 is no JSON in UTF-8 \('{' stands where , should\)"),
        ("a.json", b"[" + PAIR + b", 7]", "line 2 is no JSON object but '7'"),
        ("a.json", b'[\n{"instruction": wrong}' + b" " * 100 + b"]", r"line 2 is no JSON in UTF-8 \(Expecting value"),
        ("a.json", b'[\n{"instruction": "\xff"}]', r"a\.json, line . is no JSON in UTF-8 \('utf-8' codec"),
        ("a.json", b'{\n "data": []\n}', r"line 1 is no JSON in UTF-8"),
        ("a.json", b"[]", "has no usable record left among 0"),
        ("a.csv", b"instruction,output\na,b,c\n", "line 2 has more or fewer fields than the heading"),
        ("a.csv", b"instruction,output\na,b\na\n", "line 3 has more or fewer fields than the heading"),
        ("a.csv", b"instruction,output,output\na,b,c\n", "line 1 has the field 'output' twice"),
        ("a.csv", b'instruction,output\na,"b\n', r"after line \d+: it is no CSV in UTF-8"),
        ("a.csv", b"instruction,output\n\xff,b\n", "it is no CSV in UTF-8"),
        ("a.csv", b"question,answer\na,b\n", "line 2 fits no form, its fields are question, answer"),
        ("a.parquet", b"PAR1 no", r"cannot read .*a\.parquet: "),
        ("a.arrow", b"no arrow at all", r"cannot read .*a\.arrow: "),
    ],
)  # fmt: skip
def test_damaged_files_are_one_sentence(name: str, content: bytes, message: str, tmp_path: Path, cache: Path) -> None:
    path = write(tmp_path / name, content)
    with pytest.raises(UsageError, match=message) as error:
        Files(path).load()
    assert str(error.value).count(path) == 1 and "\n" not in str(error.value)


def test_a_packed_file_that_ends_early(tmp_path: Path) -> None:
    packed = gzip.compress(lines(*PAIRS))
    for name, content in (("a.jsonl.gz", packed[:-20]), ("b.jsonl.gz", b"plain"), ("c.json.gz", packed[:100])):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(UsageError, match=rf"{name}, after line \d+: the packed file is damaged or ends early"):
            Files(str(tmp_path / name)).load()


def test_what_is_not_there(tmp_path: Path) -> None:
    for path in ("gone.jsonl", "*.jsonl"):
        with pytest.raises(UsageError, match=r"there is no file .*jsonl: give data\.source\.path the path of a file"):
            Files(str(tmp_path / path)).load()
    (tmp_path / "folder").mkdir()
    with pytest.raises(UsageError, match=r"the folder .*folder holds no file that ends with \.jsonl"):
        Files(str(tmp_path / "folder")).load()
    for source in (Files, JsonLines):
        with pytest.raises(UsageError, match=f"{source.__name__} needs a path"):
            source(validation_path="a.jsonl")
    with pytest.raises(UsageError, match="cannot be both instruction and output"):
        HubDataset("a", instruction="x", output="x")
    with pytest.raises(UsageError, match=r"cannot fetch valid\.jsonl of the data set 'MiniLLM/Vicuna'.*test_path"):
        PaperTestSet("Vicuna").load()


# --------------------------------------------------------------------------------------------------------------------
# What is said, kept and found again


def test_what_is_dropped_is_said_also_when_it_is_found_again(
    tmp_path: Path, cache: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    caplog.set_level(logging.INFO)
    records = [*PAIRS, PAIRS[3], PAIRS[50], {"instruction": "x", "output": ""}, {"prompt": "p", "chosen": "c",
               "rejected": "r"}, {"instruction": "", "output": "b"}]  # fmt: skip
    path = write(tmp_path / "a.jsonl", lines(*records))
    first = Files(path).load()["train"]
    assert prompts(first) == [*(pair["instruction"] for pair in PAIRS), "p"], "the order of the file"
    monkeypatch.setattr("akl_lightning.data.sources.read_file", None)  # nothing is read anew
    second = Files(path).load()["train"]
    assert second._fingerprint == first._fingerprint and content_digest(first) == content_digest(second)
    for note in (
        "2 of 105 records dropped, there twice",
        "1 of 105 records dropped, without a response",
        "1 of 105 records dropped, without a prompt",
        "1 of 105 records have a rejected response, which is left",
    ):
        assert Counter(record.getMessage() for record in caplog.records)[f"{path}: {note}"] == 2, note
    assert len(list(cache.glob("*.arrow"))) == 1
    # It is mapped, not held.
    assert [file["filename"] for file in first.cache_files] == [str(next(cache.glob("*.arrow")))]


def test_an_edit_or_another_setting_is_read_anew(tmp_path: Path, cache: Path) -> None:
    path = write(tmp_path / "a.jsonl", lines({"instruction": "a", "output": "b", "other": "c"}))
    digests = {content_digest(Files(path).load()["train"]), content_digest(Files(path, output="other").load()["train"])}
    stamp = (tmp_path / "a.jsonl").stat()
    write(tmp_path / "a.jsonl", lines({"instruction": "a", "output": "d", "other": "c"}))
    os.utime(path, ns=(stamp.st_atime_ns, stamp.st_mtime_ns))
    assert json.loads(Files(path).load()["train"]["messages"][0])[1]["content"] == "d"
    assert len(digests) == 2 and len(list(cache.glob("*.arrow"))) == 3


def test_nothing_is_left_of_a_file_that_fails(tmp_path: Path, cache: Path) -> None:
    path = write(tmp_path / "a.jsonl", lines(*PAIRS) + b"{")
    with pytest.raises(UsageError, match="line 101 is no JSON"):
        Files(path).load()
    assert not [file for file in cache.iterdir() if file.suffix != ".lock"]


def test_a_full_disk_is_one_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write(tmp_path / "a.jsonl", lines(*PAIRS))

    def full(*arguments: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(pa.ipc, "new_stream", full)
    with pytest.raises(UsageError, match=r"cannot write the records of .*a\.jsonl to .*No space left on device; make"):
        Files(path).load()


def test_without_caching(tmp_path: Path, cache: Path) -> None:
    one, two = (write(tmp_path / f"{name}.jsonl", lines(PAIRS[name])) for name in (0, 1))
    datasets.disable_caching()
    try:
        loaded = [Files(path).load()["train"] for path in (one, two)]
    finally:
        datasets.enable_caching()
    assert [prompts(data) for data in loaded] == [["a0"], ["a1"]] and not cache.exists()


# --------------------------------------------------------------------------------------------------------------------
# Data sets


def test_data_sets(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    rows = datasets.Dataset.from_list(PAIRS[:5])
    rows.save_to_disk(str(tmp_path / "one"))
    assert prompts(HubDataset(str(tmp_path / "one")).load()["train"]) == ["a0", "a1", "a2", "a3", "a4"]
    datasets.DatasetDict(train=rows, test=rows, extra=rows).save_to_disk(str(tmp_path / "two"))
    assert set(HubDataset(str(tmp_path / "two")).load()) == {"train", "test"}
    assert "the splits extra are left, only train, test are read" in caplog.text
    others = datasets.DatasetDict(train_sft=rows, test_sft=rows.select([1]), train_gen=rows)
    others.save_to_disk(str(tmp_path / "sft"))
    with pytest.raises(
        UsageError, match=r"neither a split 'train' nor 'test', only train_sft, test_sft, train_gen: name"
    ):
        HubDataset(str(tmp_path / "sft")).load()
    with pytest.raises(UsageError, match="has no split 'train_dpo', only train_sft, test_sft, train_gen"):
        HubDataset(str(tmp_path / "sft"), splits={"train": "train_dpo"}).load()
    named = HubDataset(str(tmp_path / "sft"), splits={"train": "train_sft", "test": "test_sft"}).load()
    assert {split: prompts(data) for split, data in named.items()} == {
        "train": [f"a{n}" for n in range(5)],
        "test": ["a1"],
    }
    assert "the splits train_gen are left, only train_sft, test_sft are read" in caplog.text
    rows.rename_column("output", "response").to_json(tmp_path / "three/raw.jsonl")
    (one, *_) = HubDataset(str(tmp_path / "three"), data_files="raw.jsonl", output="response").load()["train"]
    assert one["form"] == "instruction" and one["line"] == 0
    with pytest.raises(UsageError, match="three, train, row 0 has no field 'output' beside 'instruction'"):
        HubDataset(str(tmp_path / "three"), data_files="raw.jsonl").load()
    with pytest.raises(UsageError, match="fits no form, its columns are x"):
        datasets.Dataset.from_dict({"x": ["a"]}).save_to_disk(str(tmp_path / "four"))
        HubDataset(str(tmp_path / "four")).load()
    conversations = [{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": None,
        "tool_calls": [{"function": {"name": "f", "arguments": '{"x": null}'}}]}]}]  # fmt: skip
    datasets.Dataset.from_list(conversations).save_to_disk(str(tmp_path / "five"))
    (call,) = HubDataset(str(tmp_path / "five")).load()["train"]
    assert json.loads(call["messages"])[1] == {
        "role": "assistant", "content": None, "tool_calls": [{"function": {"name": "f", "arguments": {"x": None}}}]
    }  # fmt: skip


def test_docstrings_of_the_standard_library() -> None:
    data = Docstrings().load()["train"]
    records = {row["name"]: row for row in data}
    assert len(records) == len(data) > 4000
    prompt, response = json.loads(records["json.dumps"]["messages"])
    assert prompt["content"].startswith("def json.dumps(obj, *, skipkeys=False")
    assert response == {"role": "assistant", "content": "Serialize ``obj`` to a JSON formatted ``str``."}
    assert records["json.dumps"]["form"] == "docstring" and records["json.dumps"]["file"] == "json/__init__.py"
    assert len({json.loads(row["messages"])[1]["content"] for row in records.values()}) == len(data)
    # unittest is part of the library, the library's own tests are not
    assert "unittest.case.TestCase.assertEqual" in records
    assert not any(name.startswith("test.") or ".tests." in name or "site-packages" in name for name in records)


def test_docstrings_of_installed_packages() -> None:
    names = Docstrings(["filelock"]).load()["train"]["name"]
    assert len(names) > 4000 and any(name.startswith("filelock.") for name in names)
    for wrong in ("no_such_package", "os.path", "six"):
        with pytest.raises(UsageError, match=f"there is no installed package '{wrong}'"):
            Docstrings([wrong]).load()


# --------------------------------------------------------------------------------------------------------------------
# Mixtures and splits


def test_a_mixture(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    one = Files(write(tmp_path / "one.jsonl", lines(*PAIRS[:40])))
    two = Files(
        write(tmp_path / "two.jsonl", lines(*PAIRS[30:])), test_path=write(tmp_path / "t.jsonl", lines(PAIRS[0]))
    )
    whole = Mixture([one, two]).load()
    assert prompts(whole["train"]) == [pair["instruction"] for pair in PAIRS] and len(whole["test"]) == 1
    assert "10 of 110 records dropped, there twice" in caplog.text
    apart = Files(write(tmp_path / "apart.jsonl", lines(*PAIRS[40:])))
    weighted = Mixture([one, apart], [2, 1])
    assert weighted.description == "2 × one.jsonl + 1 × apart.jsonl"
    said = prompts(weighted.load()["train"])
    taken = {int(prompt[1:]) for prompt in said}
    assert len(said) == len(taken) == 60 and sum(number < 40 for number in taken) == 40
    assert sorted(taken) != list(range(60)), "not simply the first ones"
    assert "apart.jsonl: 40 of 60 records left out by the weights of the mixture" in caplog.text
    assert prompts(weighted.load()["train"]) == said
    for weights in ([1], [1, 0], [1, float("nan")], [1, float("inf")]):
        with pytest.raises(UsageError, match="Mixture needs a weight above 0 for each of its 2 sources"):
            Mixture([one, apart], weights)
    with pytest.raises(UsageError, match="Mixture needs sources"):
        Mixture([])
    tests = Files(test_path=str(tmp_path / "t.jsonl"))
    with pytest.raises(UsageError, match=r"t\.jsonl has no training records that a weight"):
        Mixture([one, tests], [1, 1]).load()
    assert set(Mixture([tests, tests]).load()) == {"test"}


def test_a_weighted_mixture_holds_out_of_each_source(tmp_path: Path) -> None:
    few = [{"instruction": f"few {number}", "output": "a"} for number in range(100)]
    many = [{"instruction": f"many {number}", "output": "a"} for number in range(1000)]
    sources: list[Source] = [
        JsonLines(write(tmp_path / f"{name}.jsonl", lines(*records))) for name, records in (("a", few), ("b", many))
    ]
    splits = split_records(Mixture(sources, [1, 1]).load(), 0.1, 0.1)
    for split in ("validation", "test"):
        assert {prompt.split()[0] for prompt in prompts(splits[split])} == {"few", "many"}


def test_answers_to_one_prompt_stay_together(tmp_path: Path) -> None:
    records = [{"instruction": f"p{number % 20}", "output": f"a{number}"} for number in range(400)]
    splits = split_records(JsonLines(write(tmp_path / "a.jsonl", lines(*records))).load(), 0.13, 0.07)
    train, validation, test = (set(prompts(splits[split])) for split in ("train", "validation", "test"))
    assert not train & validation and not train & test and not validation & test and validation and test


def test_folders_say_splits_and_what_describes_a_data_set_is_no_record(tmp_path: Path) -> None:
    for split in ("train", "test"):
        (tmp_path / "d" / split).mkdir(parents=True)
        write(tmp_path / "d" / split / "x.jsonl", lines({"instruction": split, "output": "a"}))
    (tmp_path / "d" / "state.json").write_text("{}")
    loaded = Files(str(tmp_path / "d")).load()
    assert {split: prompts(data) for split, data in loaded.items()} == {"train": ["train"], "test": ["test"]}


def test_a_completion_may_have_another_name(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", lines({"prompt": "Q", "completion": "old", "better": "new"}))
    for settings, expected in (({}, "old"), ({"output": "better"}, "new")):
        (row,) = Files(path, **settings).load()["train"]
        assert json.loads(row["messages"])[-1]["content"] == expected


def split_by_hand(names: list[str], validation: int, test: int) -> dict[str, list[str]]:
    order = sorted(names, key=lambda name: hashlib.sha256(f"{name}\0".encode()).digest())
    held_out = order[: validation + test]
    return {
        "train": [name for name in names if name not in held_out],
        "validation": order[:validation],
        "test": order[validation : validation + test],
    }


def test_the_split_depends_on_prompts_alone(tmp_path: Path) -> None:
    names = [pair["instruction"] for pair in PAIRS]
    one = Files(write(tmp_path / "one.jsonl", lines(*PAIRS))).load()
    two = Files(write(tmp_path / "two.jsonl", lines(*PAIRS[::-1]))).load()
    split = {name: prompts(data) for name, data in split_records(one, 0.1, 5).items()}
    assert split == split_by_hand(names, 10, 5)
    other = {name: prompts(data) for name, data in split_records(two, 0.1, 5).items()}
    assert other == {**split, "train": split["train"][::-1]}
    given = split_records({"train": one["train"], "validation": two["train"]}, 50, 0)
    assert [len(given[name]) for name in ("train", "validation", "test")] == [100, 100, 0]
    tests = split_records({"test": one["train"]}, 0.1, 5)
    assert [len(tests[name]) for name in ("train", "validation", "test")] == [0, 0, 100]
    assert tests["train"].features == RECORD_FEATURES
    with pytest.raises(
        UsageError, match=r"leave none of 100 to train on: lower data.validation_size and data.test_size"
    ):
        split_records(one, 60, 40)
    for size in (-1, float("nan"), float("inf")):
        with pytest.raises(UsageError, match=r"data\.validation_size must be a number"):
            split_records(one, size, 0)


def test_streamed_data_are_refused() -> None:
    streamed = datasets.Dataset.from_list(PAIRS).to_iterable_dataset()
    with pytest.raises(UsageError, match=r"gives its train records as IterableDataset, .* load them without streaming"):
        split_records({"train": streamed}, 0.1, 0.1)


def test_memory_does_not_grow_with_the_records(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """At no time is more than a batch of rows alive."""
    alive = peak = 0

    class Counted(dict):
        def __init__(self, *arguments: Any, **given: Any) -> None:
            nonlocal alive, peak
            super().__init__(*arguments, **given)
            alive += 1
            peak = max(peak, alive)

        def __del__(self) -> None:
            nonlocal alive
            alive -= 1

    convert = forms.conversation
    monkeypatch.setattr(forms, "conversation", lambda *arguments: Counted(convert(*arguments)))
    records = [{"instruction": f"a{n}", "output": "b"} for n in range(5000)]
    data = Files(write(tmp_path / "a.jsonl", lines(*records))).load()["train"]
    assert len(data) == 5000 and peak <= 1001
    splits = split_records({"train": data}, 0.05, 0.05)
    assert {name: len(part) for name, part in splits.items()} == {"train": 4500, "validation": 250, "test": 250}
    assert np.array_equal(np.sort(np.concatenate([part["line"] for part in splits.values()])), np.arange(1, 5001))
