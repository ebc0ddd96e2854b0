import copy
from pathlib import Path

import huggingface_hub
import pytest
from tokenizers.normalizers import Lowercase
from transformers import PreTrainedTokenizerFast

from akl_lightning.teachers.fingerprint import hub_revision, tokenizer_digests, weights_digest
from tests.conftest import gpt2


def test_weights_by_name_value_and_precision() -> None:
    model = gpt2(16)
    before = weights_digest(model)
    assert weights_digest(copy.deepcopy(model)) == before
    assert weights_digest(copy.deepcopy(model).bfloat16()) != before
    model.lm_head.weight.data[0, 0] += 1e-6
    assert weights_digest(model) != before


def test_a_tokenizer_by_what_decides_its_tokens(tokenizer: PreTrainedTokenizerFast) -> None:
    before = tokenizer_digests(tokenizer)
    other = copy.deepcopy(tokenizer)
    other(["a", "b c"], padding=True, truncation=True, max_length=3)  # leaves its mark in the tokenizer
    assert tokenizer_digests(other) == before
    other.backend_tokenizer.normalizer = Lowercase()
    other.add_tokens(["<extra>"])
    after = tokenizer_digests(other)
    assert {name for name in before if before[name] != after[name]} == {"vocabulary", "normalizer"}


def test_the_revision_is_that_of_the_hubs_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    assert hub_revision("some/model") is None and hub_revision("../some/where/else") is None
    snapshot = tmp_path / "models--some--model/snapshots/0123abc"
    snapshot.mkdir(parents=True)
    (snapshot / "config.json").write_text("{}")
    (tmp_path / "models--some--model/refs").mkdir()
    (tmp_path / "models--some--model/refs/main").write_text("0123abc")
    assert hub_revision("some/model") == "0123abc"
