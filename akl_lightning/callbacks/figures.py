"""What the figures share: an opaque light ground under dark ink, whatever style the user has set, and words."""

import functools

from matplotlib import font_manager, style
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from transformers import PreTrainedTokenizerBase

HEAD, TAIL = "#0072b2", "#d55e00"
"""Colours of head and tail, which people who do not see all colours can tell apart (Okabe and Ito)."""

_INK = "#1a1a1a"

in_own_style = style.context("default")
"""Decorates functions that draw: in matplotlib's default style, so that a dark one does not put light ink on white."""


def blank_figure(width: float, height: float) -> Figure:
    """A figure of this size in inches, with a white ground of its own."""
    return Figure(figsize=(width, height), dpi=150, layout="constrained", facecolor="white")


def ink(axes: Axes) -> None:
    """Colour the ticks, which are made only when they are drawn, in whatever style is set then."""
    axes.tick_params(colors=_INK, labelcolor=_INK)


def word(tokenizer: PreTrainedTokenizerBase, token: int, longest: int = 14, spaces: bool = False) -> str:
    """A token as a reader sees it on an axis: no marks of the tokenizer, nothing invisible, not too long.

    Args:
        tokenizer: which knows the token.
        token: its id.
        longest: characters at most.
        spaces: show those in front, as ␣.
    """
    if token == tokenizer.eos_token_id:
        return "[end]"
    if token >= len(tokenizer):
        return f"[{token}]"
    text = str(tokenizer.decode([token]))
    if text.isspace() or (spaces and text.startswith(" ")):
        text = text.replace("\n", "⏎").replace("\t", "⇥").replace(" ", "␣")
    return shorten(text, longest)


def drawable(text: str) -> str:
    r"""A text without the characters that the figures' font lacks; they are written as in Python.

    >>> print(drawable("a\x18 ä 中"))
    a\x18 ä \u4e2d
    """
    return "".join(char if ord(char) in _glyphs() else ascii(char)[1:-1] for char in text)


@functools.cache
def _glyphs() -> frozenset[int]:
    return frozenset(font_manager.get_font(font_manager.findfont("DejaVu Sans")).get_charmap())


def shorten(text: str, longest: int) -> str:
    """A text on one line, cut to so many characters.

    >>> shorten("one  two\\nthree", 11)
    'one two th…'
    """
    text = drawable(" ".join(text.split()) or text)
    return text if len(text) <= longest else text[: longest - 1] + "…"
