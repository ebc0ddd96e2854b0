"""A module of your own: an extra loss on hidden states, an optimizer and a learning rate for each layer.

    python recipes/own_module.py --teacher PATH          # a folder with model and tokenizer

Without --pairs the data is the documentation of Python's standard library.
"""

from typing import Any

import torch
from jsonargparse import auto_cli
from lightning.pytorch import Trainer
from torch import Tensor, nn
from torchmetrics import MeanMetric
from transformers import AutoConfig

from akl_lightning.cli import run_command
from akl_lightning.criterion import CriterionOutput
from akl_lightning.data.module import InstructionDataModule
from akl_lightning.data.sources import Docstrings, JsonLines
from akl_lightning.models.layers import decoder_layers
from akl_lightning.module import DistillationModule
from akl_lightning.projection import Logits, Projection


class HiddenStateDistillation(DistillationModule):
    """Let the student's last hidden states, mapped to the teacher's width, become the teacher's as well.

    Args:
        student: as for :class:`DistillationModule`.
        teacher: likewise.
        teacher_width: of its hidden states.
        hidden_weight: of their mean squared distance.
        learning_rate: of all that is no layer, and of the last layer.
        layer_decay: what each layer's learning rate is of the next one's.
        arguments: of :class:`DistillationModule`.
    """

    def __init__(
        self,
        student: Any,
        teacher: Any,
        teacher_width: int,
        hidden_weight: float = 1.0,
        learning_rate: float = 1e-3,
        layer_decay: float = 0.8,
        **arguments: Any,
    ) -> None:
        super().__init__(student, teacher, **arguments)
        self.hidden_weight = hidden_weight
        self.lr = learning_rate  # where the learning-rate finder looks, too
        self.layer_decay = layer_decay
        self.regressor = nn.Linear(self.student.config.hidden_size, teacher_width)
        self.hidden_distance = MeanMetric()

    def compare(self, student: Logits, teacher: Logits | None, labels: Tensor) -> CriterionOutput:
        assert isinstance(student, Projection) and isinstance(teacher, Projection)
        output = super().compare(student, teacher, labels)
        distance = (self.regressor(student.hidden) - teacher.hidden).square().mean(-1)
        if self.training:
            self.hidden_distance.update(distance.detach())
        # A sum over response tokens, as the criterion's: the module divides once by all tokens of the step.
        return output._replace(loss=output.loss + self.hidden_weight * distance.sum())

    def on_train_epoch_end(self) -> None:
        super().on_train_epoch_end()
        self.log("train/hidden_distance", self.hidden_distance.compute())
        self.hidden_distance.reset()

    def configure_optimizers(self) -> Any:
        layers = [list(layer.parameters()) for layer in decoder_layers(self.student.model)[1]]
        within = {parameter for layer in layers for parameter in layer}
        groups: list[dict[str, Any]] = [{"params": [one for one in self.parameters() if one not in within]}]
        for depth, layer in enumerate(reversed(layers)):
            groups.append({"params": layer, "lr": self.lr * self.layer_decay**depth})
        return torch.optim.RAdam(groups, self.lr, weight_decay=0.01, decoupled_weight_decay=True)


def main(teacher: str, pairs: str | None = None, batch_size: int = 32, max_epochs: int = 1) -> None:
    """Distil a teacher into a student of half its layers.

    Args:
        teacher: hub name or local folder, with a tokenizer in it.
        pairs: JSON Lines with ``instruction``, ``input`` and ``output``.
        batch_size: samples of an optimizer step.
        max_epochs: epochs of training.
    """
    config = AutoConfig.from_pretrained(teacher)
    student = {"layers_of": teacher, "keep": list(range(0, config.num_hidden_layers, 2))}
    module = HiddenStateDistillation(student, teacher, config.hidden_size)
    data = InstructionDataModule(teacher, JsonLines(pairs) if pairs else Docstrings(), batch_size=batch_size)
    trainer = Trainer(max_epochs=max_epochs, logger=False, enable_checkpointing=False)
    trainer.fit(module, data)
    print({name: round(value.item(), 4) for name, value in trainer.callback_metrics.items()})


if __name__ == "__main__":
    run_command(lambda: auto_cli(main, as_positional=False))
