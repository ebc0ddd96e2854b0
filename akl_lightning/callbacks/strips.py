"""Answers as strips of cells, a cell for each token, coloured by a number of each."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from matplotlib.colors import Colormap
from matplotlib.figure import Figure
from torch import Tensor

from akl_lightning.callbacks.figures import blank_figure, in_own_style, ink, shorten, word
from akl_lightning.callbacks.samples import Row, read_until
from akl_lightning.module import DistillationModule

LONGEST = 24
"""Tokens of an answer that are drawn; more would be too narrow to read."""


class Strip(NamedTuple):
    """An answer and a number at each of its tokens."""

    prompt: str
    words: list[str]
    values: list[float]


def strip_of(module: DistillationModule, batch: Any, row: Row, values: Tensor) -> Strip:
    """The answer of a batch's sample, with a number at each of its tokens, ``[tokens]``."""
    tokenizer = module.find_tokenizer()
    assert tokenizer is not None
    prompt = str(tokenizer.decode(read_until(batch, row), skip_special_tokens=True))
    return Strip(prompt, [word(tokenizer, token) for token in row.labels.tolist()], values.tolist())


@in_own_style
def draw_strips(answers: Sequence[Strip], colours: Colormap, ticks: Mapping[float, str]) -> Figure:
    """A strip for each answer with a cell for each token.

    Args:
        answers: one or more; of a longer one its first 24 tokens are drawn.
        colours: from the lowest tick to the highest.
        ticks: of the bar that says what a colour means.
    """
    columns = min(LONGEST, max(len(answer.words) for answer in answers))
    # Cells of a fixed size, so that words have room whatever the number of tokens.
    width = max(6.4, 0.38 * columns + 0.2)
    figure = blank_figure(width, 1.2 * len(answers) + 0.6)
    rows = figure.subplots(len(answers), 1, squeeze=False)[:, 0]
    for axes, answer in zip(rows, answers, strict=True):
        words, values = answer.words[:columns], answer.values[:columns]
        image = axes.imshow([values], cmap=colours, vmin=min(ticks), vmax=max(ticks), aspect="auto")
        axes.set_xticks(range(len(words)), words, rotation=45, ha="right", rotation_mode="anchor", parse_math=False)
        axes.set_xlim(-0.5, columns - 0.5)
        axes.set_yticks([])
        axes.set_xticks([column + 0.5 for column in range(len(words) - 1)], minor=True)
        axes.grid(which="minor", axis="x", color="white", linewidth=1)
        axes.tick_params(which="minor", length=0)
        axes.tick_params(labelsize=8, length=2)
        axes.spines[:].set_visible(False)
        cut = f"  (first {columns} of {len(answer.words)} tokens)" if len(answer.words) > columns else ""
        title = shorten(answer.prompt, int(14 * width) - 20 - len(cut)) + cut
        axes.set_title(title, loc="left", size=8, parse_math=False)
        ink(axes)
    bar = figure.colorbar(image, ax=list(rows), location="bottom", shrink=min(1, 4.5 / width), aspect=45, pad=0.03)
    bar.set_ticks(list(ticks), labels=list(ticks.values()))
    bar.ax.tick_params(labelsize=8, length=2)
    bar.outline.set_visible(False)  # type: ignore[operator]
    ink(bar.ax)
    return figure
