"""Conversations, instructions and documents for the Trainer."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from lightning.pytorch import LightningDataModule
from lightning.pytorch.utilities import rank_zero_info
from torch.utils.data import DataLoader
from torchdata.stateful_dataloader import StatefulDataLoader

from akl_lightning.data.collate import PROMPTS, Rows, column
from akl_lightning.data.facts import positions_of
from akl_lightning.data.preview import summary
from akl_lightning.data.sampler import StepSampler, accumulated
from akl_lightning.data.samples import MAX_LENGTH, InstructionData
from akl_lightning.errors import UsageError


class InstructionDataModule(InstructionData, LightningDataModule):
    """Conversations, instructions and documents as batches of tokens with labels, each ``[batch, length]``.

    Batches are padded to their longest member; ``turn`` says to which turn of the assistant a learnt token belongs,
    ``index`` which samples of the split they hold. The loaders of train, validation and test serve each sample exactly
    once whatever the number of devices; the predict loader gives prompts, left-padded.

    It takes what :class:`~akl_lightning.data.samples.InstructionData` takes.
    """

    prompts_alone: bool = False
    """Whether samples of which nothing is learnt are trained on; for those who answer them on the way. They are the
    last ones of the train split, and belong to the others in any case."""

    def setup(self, stage: str) -> None:
        """Load, split and tokenize, once."""
        bounded = self._bound(positions_of(self.trainer.lightning_module)) if self.trainer else False
        if check := getattr(self._rollouts, "check_data", None):
            check(self, stage)
        if not self.splits or bounded:
            self.encode()
        train = self.splits["train"]
        if stage == "fit" and not self._answered and len(train) and not self._learnable("train"):
            raise UsageError(
                f"{type(self.source).__name__} gives train prompts alone, nothing is to be learnt of them: give "
                "samples with a response or a text, or let the student answer the prompts from the first step on "
                "(model.on_policy), with a teacher that is there."
            )
        if self.trainer is None or stage not in ("fit", "test", "predict"):
            return
        # Whoever caches all splits sets them up in a prediction.
        of_stage = {"fit": "train", "test": "test", "predict": self.predict_split}[stage]
        if self.trainer.state.fn == stage and not len(self.splits[of_stage]):
            raise UsageError(
                f"{type(self.source).__name__} gives no {of_stage} samples: give another data.source, or one with a "
                f"{of_stage} split."
            )
        if self.trainer.state.fn == stage == "fit":
            rank_zero_info(summary(self))

    def _bound(self, positions: int | None) -> bool:
        """Take no more tokens than models have positions, where the user has not said how many; whether it does."""
        if self.max_length != MAX_LENGTH or positions is None or positions >= MAX_LENGTH:
            return False
        rank_zero_info(
            f"data.max_length is {positions:,} instead of {MAX_LENGTH:,}: a model has no more positions, or the "
            "teacher's cache no longer samples"
        )
        self.max_length = positions
        return True

    @property
    def _answered(self) -> bool:
        """Whether somebody answers prompts alone on the way."""
        return self.prompts_alone or getattr(self._rollouts, "on", False)

    @property
    def _rollouts(self) -> Any:
        """Who answers, where somebody asks for the data who knows of it."""
        return getattr(self.trainer and self.trainer.lightning_module, "rollouts", None)

    # ----------------------------------------------------------------------------------------------------------------
    # Loaders

    def train_dataloader(self) -> DataLoader:
        """Batches of the train split, shuffled."""
        count = len(self.splits["train"])
        left = 0 if self._answered else count - self._learnable("train")
        said = f"train: {left:,} of {count:,} samples are prompts alone and left out, nothing is to be learnt of them"
        if left and said not in self._said:
            self._said.add(said)
            rank_zero_info(said)
        return self._loader("train", self._learnt, range(count - left), shuffle=True)

    def val_dataloader(self) -> DataLoader:
        """Batches of the validation split."""
        return self._loader("validation", self._learnt)

    def test_dataloader(self) -> DataLoader:
        """Batches of the test split."""
        return self._loader("test", self._learnt)

    def predict_dataloader(self) -> DataLoader:
        """Prompts of ``predict_split``, left-padded, with the ``index`` of each in the split, -1 in fillers.

        Raises:
            UsageError: there is none, only documents.
        """
        split = self.predict_split
        asked = np.flatnonzero(column(self.splits[split], "prompt_length"))
        if not len(asked):
            raise UsageError(f"{type(self.source).__name__} gives no {split} prompts to answer: give data.source some.")
        if left := len(self.splits[split]) - len(asked):
            rank_zero_info(
                f"{split}: {left:,} of {left + len(asked):,} samples have no prompt to answer and are left out"
            )
        return self._loader(split, PROMPTS, asked.tolist())

    def _loader(
        self, split: str, columns: Sequence[str], among: Sequence[int] | None = None, shuffle: bool = False
    ) -> DataLoader:
        rows, batch_size, trainer = Rows(self.splits[split], columns, among), self.batch_size, self.trainer
        ranks = trainer.world_size if trainer else 1

        def step_size(epoch: int) -> int:
            return batch_size * ranks * (accumulated(trainer, epoch) if trainer and split == "train" else 1)

        sampler = StepSampler(
            column(self.splits[split], "length")[rows.among].tolist(),
            batch_size,
            step_size,
            ranks,
            trainer.global_rank if trainer else 0,
            shuffle=shuffle,
            group_by_length=self.group_by_length,
            seed=self.seed,
        )
        # The Trainer says which epoch it is too late for a resumed loader, which goes through its order at once.
        sampler.set_epoch(trainer.current_epoch if trainer else 0)
        return StatefulDataLoader(
            rows,
            batch_size=batch_size,
            sampler=sampler,
            collate_fn=self.collate_prompts if columns is PROMPTS else self._collate,
            num_workers=self.num_workers,
            pin_memory=trainer is not None and trainer.strategy.root_device.type == "cuda",
            # Each iterator draws a seed for its workers; out of the global generator, a resumed run, which makes other
            # iterators, would go on with other random numbers.
            generator=torch.Generator().manual_seed(self.seed),
        )
