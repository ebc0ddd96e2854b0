"""The bytes that each token of a tokenizer stands for, which is what two tokenizers have in common."""

import hashlib
import json
import re
from collections.abc import Iterator, Sequence
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase
from transformers.convert_slow_tokenizer import bytes_to_unicode

from akl_lightning.batch import Batch, Response
from akl_lightning.errors import UsageError

SPACE = "▁"
"""What sentencepiece writes for a space."""

_BYTE_OF = {character: byte for byte, character in bytes_to_unicode().items()}
_CHARACTER_OF = bytes_to_unicode()
_FALLBACK = re.compile(r"<0x([0-9A-F]{2})>")

# NFC leaves nearly all text as it is, and what it changes is found sample by sample.
_CHANGES = {
    "Lowercase": "lower-cases",
    "StripAccents": "takes accents off",
    "BertNormalizer": "cleans up",
    "NFD": "takes accents apart",
    "NFKC": "replaces characters by others like them (NFKC)",
    "NFKD": "replaces characters by others like them (NFKD)",
    "Nmt": "replaces white space",
    "Precompiled": "replaces characters by others like them (a precompiled map)",
}
"""Normalizers behind which the bytes of a text are lost, and what each does to it."""

_CARRIERS = ("\n", "0", ".")
"""Texts to put before a piece, so that a space that a tokenizer puts before every text is not the piece's."""

GAP = b"\xff"
"""Stands for a token without bytes where tokens are joined; no text has it."""


class TokenBytes:
    r"""What each token of a tokenizer says in bytes, and how the tokenizer begins to split some.

    Byte-level BPE (GPT-2, Llama 3, Qwen, what was tiktoken's) and sentencepiece, with byte fallback or without.

    Args:
        tokenizer: a fast one, of the ``tokenizers`` library.
        role: whose it is, in messages.

    Raises:
        UsageError: nothing tells the bytes of its tokens, or it changes the text before it splits it.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, role: str) -> None:
        self._backend: Any = getattr(tokenizer, "backend_tokenizer", None)
        if self._backend is None:
            raise UsageError(
                f"the {role}'s tokenizer, {type(tokenizer).__name__}, is none of the tokenizers library, and nothing "
                "tells the bytes of its tokens: convert it to a fast one, or take models that share one tokenizer."
            )
        described = json.loads(self._backend.to_str()) | {"padding": None, "truncation": None}
        kind = described["model"]["type"]
        self._check(described, kind, role)
        self._byte_level = "ByteLevel" in set(_types(described["decoder"])) | set(_types(described["pre_tokenizer"]))
        if not self._byte_level and SPACE not in json.dumps(described["decoder"], ensure_ascii=False):
            raise UsageError(
                f"the {role}'s tokenizer, a {kind} without ByteLevel or {SPACE!r} in its decoder, does not tell the "
                "bytes of its tokens: take models that share one tokenizer."
            )
        added, special = self._backend.get_added_tokens_decoder(), set(tokenizer.all_special_ids) - {None}
        special |= {token for token, one in added.items() if one.special}
        names = {token: name for name, token in self._backend.get_vocab(with_added_tokens=True).items()}
        unknown = described["model"].get("unk_token")
        self.bytes: list[bytes | None] = [None] * (max(names, default=-1) + 1)
        """Of each token by its id; None of special tokens, of the unknown one, and where there is no token."""
        for token, name in names.items():
            if token not in special and name != unknown:
                self.bytes[token] = self._bytes_of(name, token in added)
        self.special = special
        """Ids of special tokens."""
        self.digest = hashlib.sha256(json.dumps([described, sorted(special)], sort_keys=True).encode()).hexdigest()
        """What tells the tokenizer from others."""
        self._dummy = self.join(self.encode("a")) != b"a"
        self._dummied = self._behind_which_a_space(added, tokenizer.bos_token_id)

    @staticmethod
    def _check(described: dict[str, Any], kind: str, role: str) -> None:
        if kind == "WordPiece":
            raise UsageError(
                f"the {role}'s tokenizer is a WordPiece, which does not keep the white space of a text: take a model "
                "with another tokenizer, or models that share one."
            )
        for normalizer in _types(described["normalizer"]):
            if normalizer in _CHANGES:
                raise UsageError(
                    f"the {role}'s tokenizer {_CHANGES[normalizer]} before it splits a text, so that its tokens no "
                    "longer say what the text did: take a model with another tokenizer, or models that share one."
                )

    def _bytes_of(self, name: str, added: bool) -> bytes | None:
        if self._byte_level:
            if not added:
                return bytes(_BYTE_OF[one] for one in name) if all(one in _BYTE_OF for one in name) else None
            return name.encode()
        if fallback := _FALLBACK.fullmatch(name):
            return bytes([int(fallback[1], 16)])
        return name.replace(SPACE, " ").encode()

    def _behind_which_a_space(self, added: dict[int, Any], bos: int | None) -> set[int]:
        """Tokens behind which the tokenizer writes a space before the text, which the text does not have."""
        if not self._dummy:
            return set()
        # Some write it at the beginning of a text alone, others behind whatever is no text.
        one = next(iter(added.values()), None)
        again = one is not None and self.join(self.encode(f"{one.content}a")).endswith(b" a")
        return set(added) if again else set() if bos is None else {bos}

    def __len__(self) -> int:
        return len(self.bytes)

    def of(self, token: int) -> bytes | None:
        """The bytes of a token; None where it has none, beyond the vocabulary too."""
        return self.bytes[token] if 0 <= token < len(self.bytes) else None

    def lengths(self, tokens: Tensor, before: Tensor | None = None) -> Tensor:
        """How many bytes of a text each of some tokens says, int64; 0 where it has none.

        Args:
            tokens: ids.
            before: ids of the tokens before these, ``[tokens]``; behind some of them a tokenizer like sentencepiece's
                writes a space of its own, which is not counted. Where it writes none before a space of the text, as few
                do, that one goes uncounted.
        """
        lengths, spaced, dummied = (of.to(tokens.device) for of in self._counted)
        last = len(self.bytes)
        tokens = tokens.clamp(max=last)
        if before is None:
            return lengths[tokens]
        return lengths[tokens] - (spaced[tokens] & dummied[before.clamp(max=last)]).long()

    @cached_property
    def _counted(self) -> tuple[Tensor, Tensor, Tensor]:
        """Of each token its length, whether it begins with a space, and whether one of the tokenizer's own follows it.

        The last stands for all beyond the vocabulary.
        """
        said = [*(of or b"" for of in self.bytes), b""]
        return (
            torch.tensor([len(of) for of in said]),
            torch.tensor([of.startswith(b" ") for of in said]),
            torch.tensor([token in self._dummied for token in range(len(said))]),
        )

    def join(self, tokens: Sequence[int]) -> bytes:
        """What tokens say, one after another; each that has no bytes is a :data:`GAP`."""
        return b"".join(GAP if (of := self.of(token)) is None else of for token in tokens)

    def encode(self, text: str) -> list[int]:
        """The tokens of a text alone, special ones only where their names stand in it."""
        return self._backend.encode(text, add_special_tokens=False).ids

    def first_tokens(self, pieces: Sequence[bytes]) -> list[int | None]:
        """The token with which the tokenizer begins each of some pieces of text, where its bytes begin the piece.

        Args:
            pieces: none of them empty; a piece may be a part of a character.

        Returns:
            None where no token begins the piece.
        """
        texts = [_text(piece) for piece in pieces]
        found: list[int | None] = [None] * len(pieces)
        missing = [number for number, text in enumerate(texts) if text is not None]
        for carrier in _CARRIERS if self._dummy else ("",):
            whole = [f"{carrier}{texts[number]}" for number in missing]
            encodings = self._backend.encode_batch(whole, add_special_tokens=False)
            for number, encoding in zip(missing, encodings, strict=True):
                found[number] = self._begins(encoding.ids, carrier, pieces[number])
            missing = [number for number in missing if found[number] is None]
        return [
            self._begins_raw(piece, text) if token is None else token
            for piece, text, token in zip(pieces, texts, found, strict=True)
        ]

    def _begins(self, tokens: Sequence[int], carrier: str, piece: bytes) -> int | None:
        """The token behind a carrier, if one begins there."""
        starts, said = {carrier.encode(), b" " + carrier.encode()} if carrier else {b""}, b""
        for token in tokens:
            of = self.of(token)
            if of is None:
                return None
            if said in starts and piece.startswith(of):
                return token
            said += of
        return None

    def _begins_raw(self, piece: bytes, text: str | None) -> int | None:
        """As the merges alone split a piece, without what comes before them."""
        if self._byte_level:
            text = "".join(_CHARACTER_OF[byte] for byte in piece)
        elif text is None:  # a part of a character
            return self._backend.token_to_id(f"<0x{piece[0]:02X}>")
        try:
            tokens = self._backend.model.tokenize(text.replace(" ", SPACE))
        except Exception:  # the library's own, where a model has no token for a character and none for what is unknown
            return None
        token = tokens[0].id if tokens else None
        of = None if token is None else self.of(token)
        return token if of and piece.startswith(of) else None

    def lacking(self) -> list[int]:
        """Bytes that no token says alone, of those that UTF-8 has: texts with them may not be said."""
        alone = {of[0] for of in self.bytes if of is not None and len(of) == 1}
        return [byte for byte in range(0xF5) if byte not in alone and byte not in (0xC0, 0xC1)]


def bytes_of(tokenizer: PreTrainedTokenizerBase | None) -> TokenBytes | None:
    """What a tokenizer's tokens say, or None where it does not tell."""
    try:
        return None if tokenizer is None else TokenBytes(tokenizer, "student")
    except UsageError:
        return None


def lengths(tokens: TokenBytes | None, batch: Batch, response: Response) -> dict[str, Tensor]:
    """The entry ``bytes`` of a batch, how many each of its response tokens says, where that is known."""
    if tokens is None:
        return {}
    before = batch["input_ids"].flatten()[response.positions]
    return {"bytes": tokens.lengths(response.labels, before)}


def _text(piece: bytes) -> str | None:
    try:
        return piece.decode()
    except UnicodeDecodeError:
        return None


def _types(part: dict[str, Any] | None) -> Iterator[str]:
    """The types of what a tokenizer's description has in a place, and of what that is a sequence of."""
    if part is None:
        return
    yield part["type"]
    for name in ("normalizers", "pretokenizers", "decoders"):
        for one in part.get(name, ()):
            yield from _types(one)
