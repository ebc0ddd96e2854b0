"""A teacher is trained once for all that it depends on."""

import json
from pathlib import Path
from typing import Any

from jsonargparse import Namespace
from transformers import AutoModelForCausalLM, AutoTokenizer

from common.own_teacher import prepare_teacher
from tests.conftest import PAIRS

MODEL = {"model_type": "gpt2", "n_layer": 1, "n_embd": 16, "n_head": 2, "n_positions": 64}


def test_it_is_trained_once_and_found_again(tmp_path: Path, capsys: Any) -> None:
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(pair) + "\n" for pair in PAIRS))
    source = Namespace(
        class_path="akl_lightning.data.sources.JsonLines", init_args={"path": str(tmp_path / "pairs.jsonl")}
    )
    data = Namespace(
        source=source, template="plain", max_length=40, max_prompt_length=None, group_by_length=True, seed=0,
        validation_size=4, test_size=4,
    )  # fmt: skip
    student = MODEL | {"vocab_size": 300, "bos_token_id": 0, "eos_token_id": 0}

    def prepare(**settings: Any) -> Path:
        return prepare_teacher(student, data, MODEL, 300, 1, cache_dir=str(tmp_path / "cache"), **settings)

    folder = prepare()
    assert "training, once" in capsys.readouterr().out
    tokenizer, model = AutoTokenizer.from_pretrained(folder), AutoModelForCausalLM.from_pretrained(folder)
    assert model.config.vocab_size == len(tokenizer) <= 300
    assert model.config.eos_token_id == tokenizer.eos_token_id
    assert prepare() == folder and "found in" in capsys.readouterr().out
    assert len({folder, prepare(seed=1), prepare(precision="bf16-mixed")}) == 3
