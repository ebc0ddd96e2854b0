"""The adaptive head weight along single answers, token by token."""

from collections.abc import Sequence
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure

from akl_lightning.callbacks.figures import HEAD, TAIL
from akl_lightning.callbacks.loggers import log_figure
from akl_lightning.callbacks.samples import SampleCallback, response_rows
from akl_lightning.callbacks.strips import Strip, draw_strips, strip_of
from akl_lightning.module import DistillationModule


class HeadWeightMap(SampleCallback):
    """Draw the head weight along some validation answers after every validation, for the loggers.

    The answers are those of the data, the same ones every time; they go to the loggers as ``head_weight_map``.

    Args:
        answers: how many.

    Raises:
        UsageError: no teacher, no tokenizer or no logger.
    """

    def look_at(self, trainer: Trainer, module: DistillationModule, outputs: Any, batch: Any, wanted: int) -> None:
        """Keep the weights of the answers."""
        if trainer.is_global_zero:
            weights = outputs["statistics"]["head_weight"]
            rows = response_rows(module, batch)[:wanted]
            self.found += [strip_of(module, batch, row, weights[row.within]) for row in rows]

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Draw."""
        if self.found:
            log_figure(trainer, "head_weight_map", draw_weight_map(self.found))


def draw_weight_map(answers: Sequence[Strip]) -> Figure:
    """A strip for each answer with a cell for each token, which has the colour of its head weight.

    Args:
        answers: one or more; of a longer one its first 24 tokens are drawn.
    """
    colours = LinearSegmentedColormap.from_list("tail to head", [TAIL, "#f2f2f2", HEAD])
    return draw_strips(answers, colours, {0: "0: tail, RKL", 0.5: "head weight", 1: "1: head, FKL"})
