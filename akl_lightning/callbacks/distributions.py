"""The teacher's and the student's distribution at one position."""

from collections.abc import Sequence
from typing import Any

import torch
from lightning.pytorch import Trainer
from matplotlib.figure import Figure
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from akl_lightning import functional as F
from akl_lightning.batch import KEYS, OF_TEACHER
from akl_lightning.callbacks.figures import HEAD, blank_figure, drawable, in_own_style, ink, shorten, word
from akl_lightning.callbacks.loggers import log_figure
from akl_lightning.callbacks.samples import Row, SampleCallback, read_until, response_rows
from akl_lightning.errors import check_count
from akl_lightning.module import DistillationModule
from akl_lightning.teachers.aligned import AlignedTeacher

_SHOWN = 12
"""Tokens that are drawn."""


class DistributionPlot(SampleCallback):
    """Draw what teacher and student expect next at one position of a validation answer, after every validation.

    The position is the same every time; the figure goes to the loggers as ``distributions``.

    Args:
        position: which token of the answer is expected, counted from 0; of a shorter answer its last.

    Raises:
        UsageError: no teacher, no tokenizer or no logger.
    """

    def __init__(self, position: int = 1) -> None:
        check_count("position", position, least=0)
        super().__init__(answers=1)
        self.position = position

    def look_at(self, trainer: Trainer, module: DistillationModule, outputs: Any, batch: Any, wanted: int) -> None:
        """Draw: it is the batch that the sample lies in."""
        # On every rank, with or without a response, as each may have a part of the models.
        rows = response_rows(module, batch)
        index = rows[0].number if rows else 0
        sample = {key: batch[key][index : index + 1] for key in (*KEYS, *OF_TEACHER) if key in batch}
        position = self._position(rows[0], batch) if rows else 0
        student, teacher = module.distributions(sample, slice(position, position + 1))
        if not rows or not trainer.is_global_zero:
            return
        divergence, tokenizer = module.criterion.divergence, module.find_tokenizer()
        assert tokenizer is not None
        in_head = F.head_mask(teacher, divergence.mu, divergence.head_rule)[0].cpu()
        student, teacher = student[0].cpu(), teacher[0].cpu()
        tokens = likeliest(student, teacher, _SHOWN)
        of_classes = isinstance(module.teacher, AlignedTeacher)
        kind = "classes" if of_classes else "tokens"
        shown = module.teacher.tokens_of(tokens) if of_classes else tokens.tolist()  # type: ignore[union-attr]
        figure = draw_distributions(
            distinct_words(tokenizer, shown),
            student[tokens].tolist(),
            teacher[tokens].tolist(),
            in_head[tokens].tolist(),
            head=f"head: {in_head.sum():,.3g} of {len(teacher):,} {kind}, {(teacher * in_head).sum():.0%} of p",
            context=str(tokenizer.decode(read_until(batch, rows[0], position), skip_special_tokens=True)),
            expected=word(tokenizer, int(rows[0].labels[position])),
        )
        log_figure(trainer, "distributions", figure)

    def _position(self, row: Row, batch: Any) -> int:
        """Which token of the answer, of those at which the teacher has something to say."""
        places = list(range(len(row.labels)))
        if "is_aligned" in batch:
            places = batch["is_aligned"][row.within].nonzero().flatten().tolist() or places
        return next((place for place in places if place >= self.position), places[-1])


def likeliest(student: Tensor, teacher: Tensor, count: int) -> Tensor:
    """The tokens that student or teacher think likeliest, in descending order of the teacher's probability.

    Args:
        student: probabilities ``[vocab]``.
        teacher: likewise.
        count: tokens at most.

    >>> likeliest(torch.tensor([0.1, 0.2, 0.6, 0.1]), torch.tensor([0.7, 0.2, 0.05, 0.05]), 2)
    tensor([0, 2])
    """
    tokens = torch.maximum(student, teacher).topk(min(count, len(teacher))).indices
    return tokens[teacher[tokens].argsort(descending=True, stable=True)]


def distinct_words(tokenizer: PreTrainedTokenizerBase, tokens: Sequence[int]) -> list[str]:
    """Tokens as words; where two would look alike, with the space in front of one of them."""
    plain = [word(tokenizer, token) for token in tokens]
    return [
        word(tokenizer, token, spaces=True) if plain.count(text) > 1 else text
        for token, text in zip(tokens, plain, strict=True)
    ]


@in_own_style
def draw_distributions(
    words: Sequence[str],
    student: Sequence[float],
    teacher: Sequence[float],
    in_head: Sequence[float],
    head: str,
    context: str,
    expected: str,
) -> Figure:
    """Two bars for each token, with a band behind those of the head.

    Args:
        words: the tokens, in descending order of the teacher's probability.
        student: its probabilities.
        teacher: likewise.
        in_head: how far the token belongs to the head, in [0, 1].
        head: what the legend says of the head.
        context: what was read before the position; its end is shown.
        expected: the word that the data has there.
    """
    figure = blank_figure(6.4, 0.3 * len(words) + 1.6)
    axes = figure.add_subplot()
    places = range(len(words))
    for place in places:
        if in_head[place]:
            label = None if any(in_head[:place]) else head
            alpha = 0.13 * in_head[place]
            axes.axhspan(place - 0.5, place + 0.5, color=HEAD, alpha=alpha, linewidth=0, label=label)
    axes.barh([place - 0.19 for place in places], teacher, 0.36, color="#3b3b3b", label="teacher, p")
    axes.barh([place + 0.19 for place in places], student, 0.36, color="#009e73", label="student, q")
    axes.set_yticks(places, words, parse_math=False)
    axes.set_ylim(len(words) - 0.5, -0.5)
    axes.set_xlim(left=0)
    axes.set_xlabel("probability")
    line = drawable(" ".join(context.split()))
    before = line if len(line) <= 64 else "…" + line[-63:]
    axes.set_title(f"After:  {before}\nIn the data:  {shorten(expected, 40)}", loc="left", size=9, parse_math=False)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="x", alpha=0.3)
    axes.set_axisbelow(True)
    figure.legend(loc="outside lower center", ncols=3, fontsize=9, frameon=False)
    ink(axes)
    return figure
