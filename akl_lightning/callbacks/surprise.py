"""What the teacher is surprised at in the student's own answers, token by token."""

from collections.abc import Sequence
from typing import Any

from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure

from akl_lightning.callbacks.figures import HEAD, TAIL
from akl_lightning.callbacks.samples import response_rows
from akl_lightning.callbacks.strips import LONGEST, Strip, draw_strips, strip_of
from akl_lightning.module import DistillationModule
from akl_lightning.teachers.aligned import AlignedTeacher

_MOST = 8.0
"""Nats from where on a surprise has the same colour."""


def surprises(module: DistillationModule, batch: Any) -> list[Strip]:
    """The first tokens of each answer of a batch, and minus the log of the teacher's probability of each, in nats.

    Of a teacher with another tokenizer, those of the tokens that are aligned, and the probability of their class.

    Every rank has to call it where models are sharded. Both are softened as the criterion's.

    Args:
        module: has the teacher.
        batch: ``input_ids``, ``attention_mask`` and ``labels``, each ``[batch, length]``.
    """
    ignore_index = module.criterion.ignore_index
    number = (batch["labels"] != ignore_index).cumsum(-1)
    few = {**batch, "labels": batch["labels"].masked_fill(number > LONGEST, ignore_index)}
    _, of_teacher = module.distributions(few, slice(None))
    classes = module.teacher.classes_of if isinstance(module.teacher, AlignedTeacher) else None
    strips = []
    for row in response_rows(module, few):
        said = row.labels if classes is None else classes(row.labels)
        surprise = -of_teacher[row.within].gather(-1, said[:, None])[:, 0].log()
        strips.append(strip_of(module, few, row, surprise))
    return strips


def draw_surprise(answers: Sequence[Strip]) -> Figure:
    """A strip for each answer, whose cells are the redder the less the teacher would have said that token.

    Args:
        answers: one or more, with nats.
    """
    colours = LinearSegmentedColormap.from_list("surprise", [HEAD, "#f2f2f2", TAIL])
    return draw_strips(
        answers, colours, {0: "0: expected", _MOST / 2: "the teacher's surprise, nats", _MOST: f"{_MOST:.0f}+"}
    )
