"""The adaptive head weight along single answers, token by token."""

from collections.abc import Sequence
from typing import Any, NamedTuple

from lightning.pytorch import Callback, LightningModule, Trainer
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure

from akl_lightning.callbacks.checks import require_logger, require_teacher, require_tokenizer
from akl_lightning.callbacks.figures import HEAD, TAIL, word
from akl_lightning.callbacks.loggers import log_figure
from akl_lightning.callbacks.samples import response_rows, wanted_of_batch
from akl_lightning.callbacks.strips import Strip, draw_strips
from akl_lightning.errors import UsageError
from akl_lightning.module import DistillationModule


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


def draw_weight_map(answers: Sequence[WeightedAnswer]) -> Figure:
    """A strip for each answer with a cell for each token, which has the colour of its head weight.

    Args:
        answers: one or more; of a longer one its first 24 tokens are drawn.
    """
    strips = [Strip(answer.prompt, answer.words, answer.weights) for answer in answers]
    colours = LinearSegmentedColormap.from_list("tail to head", [TAIL, "#f2f2f2", HEAD])
    return draw_strips(strips, colours, {0: "0: tail, RKL", 0.5: "head weight", 1: "1: head, FKL"})
