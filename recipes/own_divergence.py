"""A divergence of your own, in ten lines: chunks, metrics and the command line come for free.

    python recipes/own_divergence.py --teacher PATH          # a folder with model and tokenizer
    PYTHONPATH=. akl fit --model.criterion.divergence recipes.own_divergence.AlphaDivergence \\
        --model.criterion.divergence.order 0.3 --model.student small --model.teacher large --data.tokenizer large

Without --pairs the data is the documentation of Python's standard library.
"""

from jsonargparse import auto_cli
from lightning.pytorch import Trainer
from torch import Tensor

from akl_lightning.cli import run_command
from akl_lightning.criterion import DistillationCriterion
from akl_lightning.data.module import InstructionDataModule
from akl_lightning.data.sources import Docstrings, JsonLines
from akl_lightning.divergences import Divergence
from akl_lightning.module import DistillationModule


class AlphaDivergence(Divergence):
    """Amari's ``(1 - Σ p^a q^(1 - a)) / (a (1 - a))``: reverse KL where the order a goes to 0, forward KL at 1."""

    def __init__(self, order: float = 0.5) -> None:
        super().__init__()
        self.order = order

    def compare(self, student: Tensor, teacher: Tensor) -> Tensor:
        overlap = (self.order * teacher + (1 - self.order) * student).exp().sum(-1)
        return (1 - overlap) / (self.order * (1 - self.order))


def main(teacher: str, pairs: str | None = None, order: float = 0.5, batch_size: int = 32, max_epochs: int = 1) -> None:
    """Distil a teacher into a student made of its first layer.

    Args:
        teacher: hub name or local folder, with a tokenizer in it.
        pairs: JSON Lines with ``instruction``, ``input`` and ``output``.
        order: of the divergence, between 0 and 1.
        batch_size: samples of an optimizer step.
        max_epochs: epochs of training.
    """
    module = DistillationModule(
        {"layers_of": teacher, "keep": [0]}, teacher, DistillationCriterion(AlphaDivergence(order))
    )
    data = InstructionDataModule(teacher, JsonLines(pairs) if pairs else Docstrings(), batch_size=batch_size)
    trainer = Trainer(max_epochs=max_epochs, logger=False, enable_checkpointing=False)
    trainer.fit(module, data)
    print({name: round(value.item(), 4) for name, value in trainer.callback_metrics.items()})


if __name__ == "__main__":
    run_command(lambda: auto_cli(main, as_positional=False))
