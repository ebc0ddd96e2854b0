"""All figures, drawn as PNG: readable on any ground and in any style, and full of awkward words."""

import io
from itertools import pairwise

import matplotlib.style
import numpy as np
import pytest
from matplotlib.figure import Figure
from matplotlib.image import imread
from transformers import PreTrainedTokenizerFast

from akl_lightning.callbacks import draw_distributions, draw_head_tail, draw_weight_map
from akl_lightning.callbacks.figures import shorten, word
from akl_lightning.callbacks.strips import Strip

AWKWARD = ["$x^", "\\frac{", "_", "⏎", "␣", "supercalifrag…", "�", "[end]", "%", "$"]


def head_tail() -> Figure:
    return draw_head_tail(
        {
            "train/head_error": [(1, 0.5), (2, 0.4)],
            "val/head_error": [(1, 0.45), (2, 0.38)],
            "train/tail_error": [(1, 0.9), (2, 0.7)],
            "val/tail_error": [(1, 0.8), (2, 0.65)],
        }
    )


def weight_map() -> Figure:
    weights = [index / 9 for index in range(10)]
    return draw_weight_map(
        [
            Strip("cost in $ of a_{b}\n\nand a prompt that goes on " + "and on " * 30, AWKWARD, weights),
            Strip("short", ["yes"], [0.3]),
            Strip("long", AWKWARD * 5, weights * 5),
        ]
    )


def distributions() -> Figure:
    falling = [0.3 / (index + 1) for index in range(10)]
    head = [index < 2 for index in range(10)]
    return draw_distributions(AWKWARD, falling[::-1], falling, head, "head: 2 of 9 tokens, 51% of p", "$ " * 60, "$x")


def png(figure: Figure) -> np.ndarray:
    file = io.BytesIO()
    figure.savefig(file, format="png")
    file.seek(0)
    return imread(file)


DRAW = pytest.mark.parametrize("draw", [head_tail, weight_map, distributions])


@DRAW
def test_a_dark_style_of_the_user_changes_nothing(draw: object) -> None:
    light = png(draw())
    with matplotlib.style.context("dark_background"):
        dark = png(draw())
    assert np.array_equal(light, dark)


@DRAW
def test_the_ground_is_white_and_opaque_and_the_ink_dark(draw: object) -> None:
    pixels = png(draw())
    assert (pixels[..., 3] == 1).all()
    border = np.concatenate([pixels[0], pixels[-1], pixels[:, 0], pixels[:, -1]])[:, :3]
    assert (border == 1).all(), "something is cut off at the edge"
    assert (pixels[..., :3].max(-1) < 0.15).mean() > 0.002


@DRAW
def test_no_text_lies_on_another_or_outside(draw: object) -> None:
    figure = draw()
    figure.draw_without_rendering()
    for axes in figure.axes:
        for labels, direction in ((axes.get_xticklabels(), "x"), (axes.get_yticklabels(), "y")):
            shown = [label for label in labels if label.get_text() and label.get_rotation() == 0]
            boxes = sorted((getattr(label.get_window_extent(), f"interval{direction}") for label in shown), key=min)
            assert all(one[1] <= other[0] for one, other in pairwise(boxes))
        for text in (axes.title, axes._left_title):
            assert text.get_window_extent().x1 <= figure.bbox.x1


def test_words_are_readable(tokenizer: PreTrainedTokenizerFast) -> None:
    def first(text: str) -> int:
        return tokenizer(text)["input_ids"][0]

    assert tokenizer.convert_ids_to_tokens(first(" again")).startswith("Ġ")
    assert word(tokenizer, first(" again")) == "again"
    assert word(tokenizer, first(" again"), spaces=True) == "␣again"
    assert word(tokenizer, first(" again"), longest=3) == "ag…"
    assert word(tokenizer, first("\n")) == "⏎"
    assert word(tokenizer, first("  ")) == "␣"
    assert word(tokenizer, tokenizer.eos_token_id) == "[end]"
    assert word(tokenizer, len(tokenizer) + 3) == f"[{len(tokenizer) + 3}]"  # an output that pads the vocabulary


def test_what_is_shortened_fits() -> None:
    assert shorten("a" * 20, 10) == "a" * 9 + "…"
    assert shorten("a\n b", 10) == "a b"
    assert shorten("中文 \x00", 20) == "\\u4e2d\\u6587 \\x00"
