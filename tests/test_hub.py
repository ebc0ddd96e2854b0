"""What cannot be loaded is refused soon, with the reason that it has."""

import json
import shutil
import socket
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import datasets
import pytest
import torch
from huggingface_hub import constants
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from transformers import PreTrainedTokenizerFast, T5Config, T5ForConditionalGeneration, ViTConfig, ViTModel

from akl_lightning import hub
from akl_lightning.data.sources import HubDataset, PaperTestSet
from akl_lightning.errors import UsageError
from akl_lightning.models.load import load_causal_lm, load_tokenizer, look_for_causal_lm, outline_causal_lm
from akl_lightning.models.vocabulary import tokenizer_of
from tests.conftest import gpt2


def edit(file: Path, **changed: object) -> None:
    file.write_text(json.dumps({**json.loads(file.read_text()), **changed}))


def spoil(folder: Path, how: str) -> str:
    """A folder in which a model lies that cannot be loaded, and what is to be said of it."""
    if how == "encoder-decoder":
        sizes = {"vocab_size": 30, "d_model": 8, "d_kv": 4, "d_ff": 8, "num_layers": 1, "num_heads": 2}
        T5ForConditionalGeneration(T5Config(**sizes)).save_pretrained(folder)
        return "Unrecognized configuration class .*T5Config"
    if how == "vision":
        sizes = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 8}
        ViTModel(ViTConfig(**sizes, image_size=8, patch_size=4)).save_pretrained(folder)
        return "Unrecognized configuration class .*ViTConfig"
    gpt2(16).save_pretrained(folder, max_shard_size="10KB")
    shards = sorted(folder.glob("model-*"))
    if how == "newer":
        edit(folder / "config.json", model_type="llama9")
        return "The checkpoint you are trying to load has model type `llama9` but Transformers does not recognize"
    if how == "missing shard":
        shards[0].unlink()
        return "model-00001-of-"
    if how == "no weights":
        for shard in folder.glob("model*"):
            shard.unlink()
        return "Error no file named model.safetensors"
    if how == "cut config":
        config = folder / "config.json"
        config.write_text(config.read_text()[:99])
        return "It looks like the config file at .* is not a valid JSON file"
    if how == "other sizes":
        edit(folder / "config.json", n_embd=32)
        return "You set `ignore_mismatched_sizes` to `False`"
    if how == "wrong type":
        edit(folder / "config.json", n_embd="many")
        return "Validation error for field 'n_embd': TypeError: Field 'n_embd' expected int"
    if how == "damaged shard":
        shards[0].write_bytes(shards[0].read_bytes()[:40])
        return "its weights are damaged"
    raise AssertionError(how)


KINDS = ("newer", "missing shard", "no weights", "cut config", "other sizes", "wrong type", "damaged shard")


@pytest.mark.parametrize("how", [*KINDS, "encoder-decoder", "vision"])
def test_a_folder_that_is_there_is_refused_with_the_librarys_reason(how: str, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    reason = spoil(folder, how)
    with pytest.raises(UsageError, match=rf"^cannot load the student '{folder}': .*{reason}") as error:
        load_causal_lm(str(folder), role="student")
    said = str(error.value)
    assert "no local folder" not in said and "\n" not in said and said.endswith(".") and said[-2] not in ".!:"
    if how in ("newer", "cut config", "wrong type", "encoder-decoder", "vision"):
        with pytest.raises(UsageError, match=reason):
            outline_causal_lm(str(folder), role="teacher")


def test_a_model_that_can_be_loaded_is_found_without_its_weights(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    gpt2(16).save_pretrained(tmp_path / "whole", max_shard_size="10KB")
    gpt2(16).save_pretrained(tmp_path / "base")
    adapted = get_peft_model(load_causal_lm(str(tmp_path / "base")), LoraConfig(task_type="CAUSAL_LM", r=2))
    adapted.save_pretrained(tmp_path / "adapter")
    gpt2(16).save_pretrained(tmp_path / "old")
    state = load_file(tmp_path / "old/model.safetensors")
    torch.save(state, tmp_path / "old/pytorch_model.bin")
    (tmp_path / "old/model.safetensors").unlink()
    gpt2(16).save_pretrained(apart := tmp_path / "apart", max_shard_size="10KB")
    (apart / "shards").mkdir()
    for shard in apart.glob("*.safetensors"):
        shard.rename(apart / "shards" / shard.name)
    index = apart / "model.safetensors.index.json"
    index.write_text(index.read_text().replace(': "model-', ': "shards/model-'))
    folders = [str(tmp_path / name) for name in ("whole", "adapter", "old", "apart")]
    new = {"model_type": "gpt2", "n_layer": 1, "n_embd": 8, "n_head": 2, "vocab_size": 9}
    sources = [*folders, {"layers_of": folders[0], "keep": [0]}, new, gpt2(16)]
    for source in sources:
        load_causal_lm(source)
    cached = tmp_path / "hub/models--somebody--something/snapshots/abc"
    cached.mkdir(parents=True)
    gpt2(16).save_pretrained(cached)
    (cached.parents[1] / "refs").mkdir()
    (cached.parents[1] / "refs/main").write_text("abc")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    for weights in cached.glob("*.safetensors"):
        weights.unlink()  # of a name it is left to the hub whether there are any
    for file in tmp_path.rglob("*.safetensors"):
        file.write_bytes(b"")
    (tmp_path / "old/pytorch_model.bin").write_bytes(b"")
    for source in [*sources, "somebody/something"]:
        look_for_causal_lm(source)


def test_an_adapter_whose_base_has_moved(tmp_path: Path) -> None:
    gpt2(16).save_pretrained(tmp_path / "base")
    adapted = get_peft_model(load_causal_lm(str(tmp_path / "base")), LoraConfig(task_type="CAUSAL_LM", r=2))
    adapted.save_pretrained(tmp_path / "adapter")
    shutil.rmtree(tmp_path / "base")
    match = f"cannot load the base of the student '{tmp_path}/adapter', '{tmp_path}/base': it is no local folder"
    with pytest.raises(UsageError, match=match):
        load_causal_lm(str(tmp_path / "adapter"), role="student")
    edit(tmp_path / "adapter/adapter_config.json", base_model_name_or_path=None)
    with pytest.raises(UsageError, match="does not say of which model it is"):
        load_causal_lm(str(tmp_path / "adapter"), role="student")


def test_what_is_no_model_at_all(tmp_path: Path) -> None:
    (tmp_path / "file.bin").write_bytes(b"x")
    (tmp_path / "odd.gguf").write_bytes(b"x")
    with pytest.raises(UsageError, match="it is a file; give the folder that save_pretrained wrote, or a file that"):
        load_causal_lm(str(tmp_path / "file.bin"))
    with pytest.raises(UsageError, match=r"odd\.gguf': .*[Gg][Gg][Uu][Ff]"):
        load_causal_lm(str(tmp_path / "odd.gguf"))
    with pytest.raises(UsageError, match="Unrecognized model in"):
        load_causal_lm(str(tmp_path))


@pytest.mark.parametrize("written", ['{"a":', '{"version": "1.0"}'])
def test_a_damaged_tokenizer(written: str, tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    tokenizer.save_pretrained(tmp_path)
    (tmp_path / "tokenizer.json").write_text(written)
    with pytest.raises(UsageError, match=rf"^cannot load the tokenizer '{tmp_path}': (?!it is no local)"):
        load_tokenizer(str(tmp_path))


def test_data_that_are_there(tmp_path: Path) -> None:
    pairs = datasets.Dataset.from_list([{"instruction": "a", "output": "b"}])
    pairs.to_json(tmp_path / "two/a.jsonl")
    datasets.Dataset.from_list([{"question": "a", "answer": "b"}]).to_json(tmp_path / "two/b.jsonl")
    (tmp_path / "empty").mkdir()
    (tmp_path / "odd").mkdir()
    (tmp_path / "odd/a.parquet").write_bytes(b"no")
    for name, reason in {"two": "Couldn't cast", "empty": "The directory at", "odd": "Parquet file size is"}.items():
        with pytest.raises(UsageError, match=f"{name}': {reason}.*; give a folder of files of the same columns"):
            HubDataset(str(tmp_path / name)).load()
    for name in ("one.parquet", "one.csv"):
        (pairs.to_csv if name.endswith("csv") else pairs.to_parquet)(tmp_path / "one" / name)
        with pytest.raises(UsageError, match="it is a file; give the folder that it lies in, and its name as"):
            HubDataset(str(tmp_path / "one" / name)).load()
        (pair,) = HubDataset(str(tmp_path / "one"), data_files=name).load()["train"]
        assert pair["messages"] == '[{"role":"user","content":"a"},{"role":"assistant","content":"b"}]'


# --------------------------------------------------------------------------------------------------------------------
# Names, with and without a network


@pytest.fixture
def online(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """As if nobody had said that the hub is not to be asked."""
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", False)
    hub._hub_answers.cache_clear()
    yield
    hub._hub_answers.cache_clear()


@pytest.mark.parametrize("nobody", ["closed", "silent"])
def test_without_a_network_a_name_is_refused_in_seconds(
    nobody: str, online: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    with socket.socket() as held:  # a port where nobody listens, or one where nobody answers
        held.bind(("127.0.0.1", 0))
        if nobody == "silent":
            held.listen()
        monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{held.getsockname()[1]}")
        monkeypatch.setattr(hub, "ANSWER_SECONDS", 1)
        begun = time.monotonic()
        for load in (load_causal_lm, look_for_causal_lm, outline_causal_lm, load_tokenizer):
            with pytest.raises(UsageError, match="the hub has none of that name or cannot be reached"):
                load("nobody/nothing")
        assert tokenizer_of("nobody/nothing") is None
        with pytest.raises(UsageError, match="cannot load the data set 'nobody/nothing'"):
            HubDataset("nobody/nothing").load()
        with pytest.raises(UsageError, match=r"cannot fetch valid\.jsonl"):
            PaperTestSet("Vicuna").load()
        assert time.monotonic() - begun < 5
    assert not constants.HF_HUB_OFFLINE and not datasets.config.HF_HUB_OFFLINE


def test_a_hub_that_answers_is_asked(online: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    class Answers(BaseHTTPRequestHandler):
        def do_HEAD(self) -> None:
            asked.append(self.path)
            self.send_response(404)
            self.end_headers()

        def log_message(self, *_: object) -> None:
            pass

    asked: list[str] = []
    with HTTPServer(("127.0.0.1", 0), Answers) as server:
        threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
        monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{server.server_port}")
        assert not hub.out_of_reach("somebody/something") and not hub.out_of_reach("gpt2")
        assert len(asked) == 1, "one question for all names of a minute"
        with hub.hub_if_it_answers("somebody/something"):
            assert not constants.HF_HUB_OFFLINE
        server.shutdown()
    assert not hub.out_of_reach(str(tmp_path)), "a folder's code may be on the hub"
    assert hub.out_of_reach(str(tmp_path / "gone")), "a path is no name"
    assert len(asked) == 1
