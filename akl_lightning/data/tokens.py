"""From texts to tokens in one call, and from characters to tokens."""

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from itertools import pairwise

from tokenizers import Encoding
from transformers import PreTrainedTokenizerBase

Range = tuple[int, int]
"""Characters of a text, from the first to behind the last."""


@dataclass
class Text:
    """A text that is to become tokens.

    Args:
        text: the text.
        cuts: characters before which a token must begin, since a model is to go on from there.
        asked: characters whose tokens are asked for as well; there, a token may reach over.
        literal: where what looks like a special token is text.
    """

    text: str
    cuts: Sequence[int] = ()
    asked: Sequence[int] = ()
    literal: Sequence[Range] = ()


@dataclass
class Tokens:
    """Its tokens, and which of them begins at or behind each of the characters that are asked for."""

    ids: list[int]
    at: dict[int, int] = field(default_factory=dict)
    in_pieces: bool = False


class Tokenize:
    """Texts as tokens, in one call wherever that can be.

    A text is tokenized in pieces where a token would reach over a cut, where something in it looks like a special token
    and is none, and for a tokenizer that does not tell where its tokens stand.

    Args:
        tokenizer: the tokenizer.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self.tokenizer = tokenizer
        bare, whole = self._ids("a"), list(tokenizer("a")["input_ids"])
        extra = len(whole) - len(bare)
        begins = next((n for n in range(extra + 1) if whole[n : n + len(bare)] == bare), 0)
        self.lead = whole[:begins]
        """What the tokenizer writes before a text, usually a token for its beginning."""
        added = tokenizer.added_tokens_decoder
        self._numbers = {token.content: number for number, token in added.items() if token.special}
        self.special = {token.content: token for token in added.values() if token.special}
        self.special_pattern = any_of(self.special)
        # Where offsets leave out the space before a word, they do not tell whether it belongs to the token.
        self._exact = tokenizer.is_fast and tokenizer(["a b"], add_special_tokens=False).char_to_token(0, 1) is not None
        # Some write a space before a text, which is none in the middle of another.
        self._newline = self._ids("\n")
        self._prefixed = self._ids("\na") != [*self._newline, *bare]
        one = next(iter(self._numbers), None)
        self._prefixed_again = one is not None and self._ids(f"{one}a") == [self._numbers[one], *bare]

    def many(self, texts: Sequence[Text]) -> list[Tokens]:
        """Tokens of texts."""
        whole = [index for index, text in enumerate(texts) if self._exact and not text.literal]
        found: dict[int, Tokens] = {}
        if whole:
            said = self.tokenizer(
                [texts[index].text for index in whole],
                add_special_tokens=False,
                return_attention_mask=False,
                return_token_type_ids=False,
                verbose=False,
            )
            for index, encoding in zip(whole, said.encodings, strict=True):
                tokens = self._whole(encoding, texts[index])
                if tokens is not None:
                    found[index] = tokens
        return [found.get(index) or self._in_pieces(text) for index, text in enumerate(texts)]

    def behind(self, prompt: Sequence[int], text: str, literal: Sequence[Range] = ()) -> list[int]:
        """Tokens of a text that goes on from others.

        Args:
            prompt: the tokens before it, of which the last one decides whether some put a space in between.
            text: the text.
            literal: where what looks like a special token is text.
        """
        last = next((name for name, number in self._numbers.items() if [number] == list(prompt[-1:])), "\n")
        moved = [(start + len(last), end + len(last)) for start, end in literal]
        (tokens,) = self.many([Text(last + text, [len(last)], literal=moved)])
        return tokens.ids[tokens.at[len(last)] :]

    @staticmethod
    def _whole(encoding: Encoding, text: Text) -> Tokens | None:
        """Tokens out of the one call, or None where one reaches over a cut."""
        ids = encoding.ids
        at = {}
        for character in {*text.cuts, *text.asked}:
            position, index = character, None
            while position < len(text.text) and (index := encoding.char_to_token(position)) is None:
                position += 1
            if index is None:
                at[character] = len(ids)
                continue
            begins, _ = encoding.token_to_chars(index) or (character, character)
            if begins < character and character in text.cuts:
                return None
            at[character] = index + (begins < character)
        return Tokens(ids, at)

    def _in_pieces(self, text: Text) -> Tokens:
        own = self._own_special(text) if text.literal else {}
        edges = sorted({0, len(text.text), *text.cuts, *text.asked, *own, *(end for end, _ in own.values())})
        ids: list[int] = []
        at = {0: 0}
        for start, end in pairwise(edges):
            if start in own:
                ids.append(own[start][1])
            elif not any(first < start < last for first, (last, _) in own.items()):
                behind_special = self._prefixed_again and any(last == start for last, _ in own.values())
                inside = start > 0 and not behind_special
                ids += self._piece(text.text[start:end], inside, bool(text.literal))
            at[end] = len(ids)
        return Tokens(ids, at, in_pieces=True)

    def _own_special(self, text: Text) -> dict[int, tuple[int, int]]:
        """Where the special tokens of the template stand: behind each start its end and its number."""
        found, literal = {}, {start for start, _ in text.literal}
        for match in self.special_pattern.finditer(text.text):
            if match.start() in literal:
                continue
            token, end = self.special[match[0]], match.end()
            if token.rstrip:
                end += len(text.text[end:]) - len(text.text[end:].lstrip())
            found[match.start()] = (end, self._numbers[match[0]])
        return found

    def _piece(self, text: str, inside: bool, literal: bool) -> list[int]:
        if inside and self._prefixed:
            ids = self._ids("\n" + text, literal)
            if ids[: len(self._newline)] == self._newline:
                return ids[len(self._newline) :]
        return self._ids(text, literal)

    def _ids(self, text: str, literal: bool = False) -> list[int]:
        said = self.tokenizer(text, add_special_tokens=False, split_special_tokens=literal, verbose=False)
        return list(said["input_ids"])


def any_of(texts: Iterable[str]) -> re.Pattern[str]:
    """A pattern for any of some texts, the longest first; for none of them, one that is never found."""
    return re.compile("|".join(re.escape(text) for text in sorted(texts, key=len, reverse=True)) or "(?!)")
