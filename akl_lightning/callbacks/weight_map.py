"""The adaptive head weight along single answers, token by token."""

from collections.abc import Sequence
from typing import Any, NamedTuple

from lightning.pytorch import Callback, LightningModule, Trainer
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure

from akl_lightning.callbacks.checks import require_logger, require_teacher, require_tokenizer
from akl_lightning.callbacks.figures import HEAD, TAIL, blank_figure, in_own_style, ink, shorten, word
from akl_lightning.callbacks.loggers import log_figure
from akl_lightning.callbacks.samples import response_rows, wanted_of_batch
from akl_lightning.errors import UsageError
from akl_lightning.module import DistillationModule

_LONGEST = 24
"""Tokens of an answer that are drawn; more would be too narrow to read."""


class WeightedAnswer(NamedTuple):
    """An answer and the head weight at each of its tokens."""

    prompt: str
    words: list[str]
    weights: list[float]


class HeadWeightMap(Callback):
    """Draw the head weight along some validation answers after every validation, for the loggers.

    The answers are those of the data, the same ones every time; they go to the loggers as ``head_weight_map``.

    Args:
        answers: how many.

    Raises:
        UsageError: no teacher, no tokenizer or no logger.
    """

    def __init__(self, answers: int = 4) -> None:
        if answers < 1:
            raise UsageError(f"answers must be 1 or more, got {answers}.")
        self.answers = answers
        self._found: list[WeightedAnswer] = []

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Check that there are weights, words and somewhere to draw them."""
        if stage == "fit":
            require_teacher(self, pl_module)
            require_tokenizer(self, pl_module)
            require_logger(self, trainer)

    def on_validation_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Begin anew."""
        self._found.clear()

    def on_validation_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Keep the weights of this batch's share of the answers."""
        wanted = wanted_of_batch(trainer, batch_idx, dataloader_idx, self.answers)
        if not wanted or not trainer.is_global_zero:
            return
        assert isinstance(pl_module, DistillationModule)
        tokenizer = pl_module.find_tokenizer()
        assert tokenizer is not None
        for row in response_rows(pl_module, batch)[:wanted]:
            prompt = batch["input_ids"][row.number, : row.positions[0] + 1]
            prompt = prompt[batch["attention_mask"][row.number, : len(prompt)].bool()]
            self._found.append(
                WeightedAnswer(
                    str(tokenizer.decode(prompt, skip_special_tokens=True)),
                    [word(tokenizer, token) for token in row.labels.tolist()],
                    outputs["statistics"]["head_weight"][row.within].tolist(),
                )
            )

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Draw."""
        if self._found:
            log_figure(trainer, "head_weight_map", draw_weight_map(self._found))


@in_own_style
def draw_weight_map(answers: Sequence[WeightedAnswer]) -> Figure:
    """A strip for each answer with a cell for each token, which has the colour of its head weight.

    Args:
        answers: one or more; of a longer one its first 24 tokens are drawn.
    """
    columns = min(_LONGEST, max(len(answer.words) for answer in answers))
    # Cells of a fixed size, so that words have room whatever the number of tokens.
    width = max(6.4, 0.38 * columns + 0.2)
    figure = blank_figure(width, 1.2 * len(answers) + 0.6)
    colours = LinearSegmentedColormap.from_list("tail to head", [TAIL, "#f2f2f2", HEAD])
    rows = figure.subplots(len(answers), 1, squeeze=False)[:, 0]
    for axes, answer in zip(rows, answers, strict=True):
        words, weights = answer.words[:columns], answer.weights[:columns]
        image = axes.imshow([weights], cmap=colours, vmin=0, vmax=1, aspect="auto")
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
    bar.set_ticks([0, 0.5, 1], labels=["0: tail, RKL", "head weight", "1: head, FKL"])
    bar.ax.tick_params(labelsize=8, length=2)
    bar.outline.set_visible(False)  # type: ignore[operator]
    ink(bar.ax)
    return figure
