"""What tokens say in bytes, checked by hand on tiny tokenizers and by round trips on real ones."""

import json
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from akl_lightning.criterion import DistillationCriterion
from akl_lightning.data.module import InstructionDataModule
from akl_lightning.data.sources import JsonLines
from akl_lightning.errors import UsageError
from akl_lightning.module import DistillationModule
from akl_lightning.tokenizers.bytes import GAP, TokenBytes
from tests.conftest import gpt2
from tests.tokenizers.real import REAL, real
from tests.tokenizers.tiny import END, byte_level, fast, sentencepiece

TEXTS = [
    "", "a", " a", "the the\n\n  the", "def f(x_1):\n\treturn x\r\n", "naïve café", "e\u0301", "Привет, мир",
    "你好，世界", "👩‍👩‍👧 👍🏽", "\u200b\x00\x7f", "<|im_end|", "▁", "   ",
]  # fmt: skip


def test_a_byte_level_token_is_its_bytes() -> None:
    tokenizer = byte_level(["Ġ t", "Ã ©"])
    tokens = TokenBytes(tokenizer, "student")
    assert tokens.of(tokenizer.convert_tokens_to_ids("Ġt")) == b" t"
    assert tokens.of(tokenizer.convert_tokens_to_ids("Ã©")) == "é".encode()
    assert tokens.of(tokenizer.convert_tokens_to_ids(END)) is None
    assert tokens.of(10_000) is None and tokens.of(-1) is None
    assert len(tokens) == 259 and not tokens.lacking()


def test_sentencepiece_has_spaces_bytes_and_the_same_letter_twice() -> None:
    tokenizer = sentencepiece(["▁", "A", "t"], ["▁ t"])
    tokens = TokenBytes(tokenizer, "student")
    said = {name: tokens.of(tokenizer.convert_tokens_to_ids(name)) for name in ("▁", "▁t", "A", "<0x41>", "<unk>")}
    assert said == {"▁": b" ", "▁t": b" t", "A": b"A", "<0x41>": b"A", "<unk>": None}
    # The space that it puts before every text is no part of it.
    assert tokens.join(tokenizer.encode("A€", add_special_tokens=False)) == " A€".encode()


@pytest.mark.parametrize("text", TEXTS)
def test_tokens_join_to_the_text(text: str) -> None:
    merged = TokenBytes(byte_level(["t h", "th e", "Ġ the", "ð Ł"]), "student")
    assert merged.join(merged.encode(text)) == text.encode()
    pieces = TokenBytes(sentencepiece(["▁", "t", "h", "e"], ["t h", "th e", "▁ the"]), "student")
    # It cannot tell its own space from the sign that it writes for one.
    assert pieces.join(pieces.encode(text)) == (b" " + text.replace("▁", " ").encode() if text else b"")


@pytest.mark.parametrize("name", REAL)
@pytest.mark.parametrize("text", TEXTS)
def test_tokens_of_real_tokenizers_join_to_the_text(name: str, text: str) -> None:
    tokens = TokenBytes(real(name), "teacher")
    joined = tokens.join(tokens.encode(text))
    assert joined == text.encode() or any(byte in tokens.lacking() for byte in text.encode())


def test_special_tokens_say_nothing_and_added_words_their_text() -> None:
    tokenizer = byte_level()
    tokenizer.add_tokens(["Ġodd word"])
    tokenizer.add_special_tokens({"additional_special_tokens": ["<turn>"]})
    tokens = TokenBytes(tokenizer, "student")
    ids = tokens.encode(f"aĠodd word<turn>b{END}")
    assert tokens.join(ids) == b"a" + "Ġodd word".encode() + GAP + b"b" + GAP


def first_only() -> PreTrainedTokenizerFast:
    """A tokenizer that writes a space at the beginning of a text and behind no token, as Llama's second one."""
    tokenizer = sentencepiece(["▁", "t", "h", "e"], ["t h", "th e", "▁ the"])
    backend = tokenizer.backend_tokenizer
    backend.normalizer = None  # type: ignore[assignment]
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    tokenizer.add_special_tokens({"bos_token": "<s>"})
    return tokenizer


@pytest.mark.parametrize("text", ["the the", "t", "é the", "", "\nthe"])
def test_a_space_that_a_tokenizer_writes_before_a_text_is_no_byte_of_it(text: str) -> None:
    legacy = sentencepiece(["▁", "t", "h", "e"], ["t h", "th e", "▁ the"])
    for tokenizer, begins in ((legacy, legacy.eos_token), (first_only(), "<s>"), (byte_level(["Ġ t"]), END)):
        tokens = TokenBytes(tokenizer, "student")
        ids = torch.tensor([tokenizer.convert_tokens_to_ids(begins), *tokens.encode(text)])
        assert tokens.lengths(ids[1:], ids[:-1]).sum() == len(text.encode())
        assert len(tokens.join(ids[1:].tolist())) == len(text.encode()) + (begins != END or tokenizer is legacy) * bool(
            text
        )
    # A space of the text's own is counted beside it; and behind other tokens the tokenizer writes none.
    tokens = TokenBytes(legacy, "student")
    assert tokens.lengths(torch.tensor(tokens.encode(" the"))).sum() == 5
    ids = torch.tensor([legacy.eos_token_id, *tokens.encode(" the")])
    assert tokens.lengths(ids[1:], ids[:-1]).sum() == 4
    tokens, end = TokenBytes(first_only(), "student"), torch.tensor([legacy.eos_token_id])
    space = torch.tensor([legacy.convert_tokens_to_ids("▁")])
    assert tokens.lengths(space, end) == 1


@pytest.mark.parametrize("special", [True, False])
def test_the_bytes_of_a_batch_are_those_of_what_is_said(special: bool, tmp_path: Path) -> None:
    turns = ["what", "the 👍 the", "and", " the"]
    messages = [{"role": ("user", "assistant")[number % 2], "content": turn} for number, turn in enumerate(turns)]
    (tmp_path / "chats.jsonl").write_text(json.dumps({"messages": messages}) + "\n")
    tokenizer = sentencepiece(["▁", "t", "h", "e"], ["t h", "th e", "▁ the"])
    begins = "<turn>" if special else "\n"
    tokenizer.add_special_tokens({"additional_special_tokens": ["<turn>"]})
    tokenizer.chat_template = (
        f"{{% for m in messages %}}{{{{ m.role + {begins!r} + m.content }}}}{END}{{% endfor %}}"
        f"{{% if add_generation_prompt %}}{{{{ 'assistant' + {begins!r} }}}}{{% endif %}}"
    )
    data = InstructionDataModule(
        tokenizer, JsonLines(str(tmp_path / "chats.jsonl")), validation_size=0, test_size=0, max_length=200
    )
    data.setup("fit")
    (batch,) = data.samples("train")
    module = DistillationModule(gpt2(16, len(tokenizer)), criterion=DistillationCriterion(alpha=0.0))
    module.tokens = TokenBytes(tokenizer, "student")
    assert module.prepare_batch(batch)["bytes"].sum() == sum(len(turn.encode()) for turn in turns[1::2])


def test_the_first_token_of_pieces() -> None:
    tokenizer = byte_level(["t h", "th e", "Ġ t"])
    tokens = TokenBytes(tokenizer, "teacher")
    begun = tokens.first_tokens([b"they", b" to", b"xa", b"\xe4\xb8", "世".encode()])
    assert [tokens.of(token) for token in begun] == [b"the", b" t", b"x", b"\xe4", b"\xe4"]


def test_the_first_token_of_pieces_without_the_dummy_prefix() -> None:
    tokens = TokenBytes(sentencepiece(["▁", "t", "h", "\n"], ["▁ t", "t h"]), "teacher")
    begun = tokens.first_tokens([b"th", b" they", b" h", b"\n\n", b"\xe4\xb8", "世".encode()])
    assert [tokens.of(token) for token in begun] == [b"th", b" t", b" ", b"\n", b"\xe4", b"\xe4"]
    lacking = TokenBytes(sentencepiece(["▁", "t"], fallback=False), "teacher")
    assert lacking.first_tokens([b"z", b"tz", b"\xe4"])[::2] == [None, None]
    assert ord("z") in lacking.lacking() and ord("t") not in lacking.lacking()


def test_two_tokenizers_have_two_digests_and_padding_has_no_part_in_them() -> None:
    one, same, other = byte_level(["t h"]), byte_level(["t h"]), byte_level(["h e"])
    one(["a", "bcd"], padding=True) if one.pad_token else one(["a"], truncation=True, max_length=3)
    assert TokenBytes(one, "x").digest == TokenBytes(same, "x").digest != TokenBytes(other, "x").digest


def normalizing(*steps: normalizers.Normalizer) -> PreTrainedTokenizerFast:
    backend = Tokenizer(models.BPE({one: i for i, one in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}, []))
    backend.normalizer = normalizers.Sequence(list(steps))
    backend.pre_tokenizer, backend.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    return fast(backend)


def test_what_changes_a_text_is_refused_with_its_reason() -> None:
    for step, reason in ((normalizers.Lowercase(), "lower-cases"), (normalizers.NFKC(), "NFKC")):
        with pytest.raises(UsageError, match=f"the teacher's tokenizer .*{reason}"):
            TokenBytes(normalizing(normalizers.NFC(), step), "teacher")
    composing = TokenBytes(normalizing(normalizers.NFC()), "teacher")  # what it changes is found in the samples
    assert composing.join(composing.encode("e\u0301")) == "é".encode()
    word_piece = Tokenizer(models.WordPiece({"[UNK]": 0, "a": 1}, unk_token="[UNK]"))
    with pytest.raises(UsageError, match="WordPiece"):
        TokenBytes(fast(word_piece), "student")
    with pytest.raises(UsageError, match="does not tell the bytes"):
        TokenBytes(fast(Tokenizer(models.WordLevel({"a": 0}, unk_token="a"))), "student")
    with pytest.raises(UsageError, match="none of the tokenizers library"):
        TokenBytes(object(), "student")
