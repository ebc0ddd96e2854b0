"""A student of your own, which is no transformers model: a recurrent network.

    python recipes/own_student.py --teacher PATH          # a folder with model and tokenizer

Without --pairs the data is the documentation of Python's standard library. Any module will do that maps a batch to
logits; its checkpoints resume like those of any other student, and with a ``generate`` it answers prompts, too.
"""

from collections.abc import Mapping
from typing import Any

import torch
from jsonargparse import auto_cli
from lightning.pytorch import Trainer
from torch import Tensor, nn

from akl_lightning.cli import run_command
from akl_lightning.data.module import InstructionDataModule
from akl_lightning.data.sources import Docstrings, JsonLines
from akl_lightning.models.load import load_tokenizer
from akl_lightning.module import DistillationModule


class RecurrentLM(nn.Module):
    """A GRU as language model.

    Args:
        vocab_size: tokens.
        width: of embeddings and states.
        layers: of the GRU.
    """

    def __init__(self, vocab_size: int, width: int = 128, layers: int = 1) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocab_size, width)
        self.gru = nn.GRU(width, width, layers, batch_first=True)
        self.head = nn.Linear(width, vocab_size, bias=False)

    def forward(self, batch: Mapping[str, Tensor]) -> Tensor:
        """Logits ``[batch, length, vocab]`` of a right-padded batch: no state has seen the padding behind it."""
        return self.head(self.gru(self.embedding(batch["input_ids"]))[0])

    @torch.no_grad()
    def generate(self, input_ids: Tensor, attention_mask: Tensor, max_new_tokens: int, **_: Any) -> Tensor:
        """Prompts and greedy answers ``[batch, length + max_new_tokens]``."""
        answers = []
        for ids, mask in zip(input_ids, attention_mask, strict=True):
            output, state = self.gru(self.embedding(ids[mask.bool()])[None])
            answer = [self.head(output[:, -1]).argmax(-1)]
            while len(answer) < max_new_tokens:
                output, state = self.gru(self.embedding(answer[-1])[None], state)
                answer.append(self.head(output[:, -1]).argmax(-1))
            answers.append(torch.cat(answer))
        return torch.cat([input_ids, torch.stack(answers)], 1)


def main(teacher: str, pairs: str | None = None, width: int = 128, batch_size: int = 32, max_epochs: int = 1) -> None:
    """Distil a teacher into a recurrent student, and print some answers.

    Args:
        teacher: hub name or local folder, with a tokenizer in it.
        pairs: JSON Lines with ``instruction``, ``input`` and ``output``.
        width: of the student.
        batch_size: samples of an optimizer step.
        max_epochs: epochs of training.
    """
    tokenizer = load_tokenizer(teacher)
    module = DistillationModule(RecurrentLM(len(tokenizer), width), teacher, max_new_tokens=16)
    data = InstructionDataModule(tokenizer, JsonLines(pairs) if pairs else Docstrings(), batch_size=batch_size)
    trainer = Trainer(max_epochs=max_epochs, logger=False, enable_checkpointing=False)
    trainer.fit(module, data)
    print({name: round(value.item(), 4) for name, value in trainer.callback_metrics.items()})
    trainer.limit_predict_batches = 1
    for answer in trainer.predict(module, data)[0][:4]:
        print(repr(tokenizer.decode(answer)))


if __name__ == "__main__":
    run_command(lambda: auto_cli(main, as_positional=False))
