from pathlib import Path

import pytest
import torch
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.loggers import TensorBoardLogger
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch.utils.data import DataLoader

from akl_lightning.callbacks import AdaptiveWeightMonitor, DistributionPlot, HeadTailPlot, HeadWeightMap, SampledAnswers
from akl_lightning.callbacks.samples import response_rows
from akl_lightning.data.module import InstructionDataModule
from akl_lightning.data.spread import spread
from akl_lightning.module import DistillationModule
from tests.conftest import QUIET, gpt2


@pytest.mark.parametrize(("places", "wanted"), [(1, 4), (3, 4), (10, 1), (97, 4), (4, 4)])
def test_as_many_as_wanted_are_taken(places: int, wanted: int) -> None:
    assert sum(spread(index, places, wanted) for index in range(places)) == wanted


def test_rows_without_a_response_are_passed_over() -> None:
    module = DistillationModule(gpt2(16), gpt2(24))
    labels = torch.tensor([[-100, -100, -100], [-100, 5, 6], [-100, -100, -100], [-100, -100, 7]])
    one, two = response_rows(module, {"labels": labels})
    assert (one.number, one.positions.tolist(), one.labels.tolist(), one.within) == (1, [0, 1], [5, 6], slice(0, 2))
    assert (two.number, two.positions.tolist(), two.labels.tolist(), two.within) == (3, [1], [7], slice(2, 3))


def pictures(path: Path) -> list[Callback]:
    return [HeadTailPlot(str(path)), HeadWeightMap(), DistributionPlot(), SampledAnswers(), AdaptiveWeightMonitor(1)]


def test_pictures_change_neither_the_student_nor_the_random_numbers(
    data: InstructionDataModule, tmp_path: Path
) -> None:
    def fit(callbacks: list[Callback]) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
        torch.manual_seed(1)
        student = gpt2(16)
        student.transformer.drop.p = 0.1
        settings = {**QUIET, "logger": TensorBoardLogger(tmp_path, "", "")}
        trainer = Trainer(**settings, max_epochs=2, val_check_interval=3, callbacks=callbacks)
        trainer.fit(DistillationModule(student, gpt2(24), max_new_tokens=6), data)
        return student.state_dict(), torch.get_rng_state()

    (with_them, state), (without, other_state) = fit(pictures(tmp_path)), fit([])
    assert torch.equal(state, other_state)
    assert all(torch.equal(with_them[name], without[name]) for name in without)


def test_a_batch_without_any_response_is_passed_over(data: InstructionDataModule, tmp_path: Path) -> None:
    class Unlabelled(InstructionDataModule):
        def val_dataloader(self) -> object:
            batches = super().val_dataloader()
            unlabelled = [{**batch, "labels": torch.full_like(batch["labels"], -100)} for batch in batches]
            return DataLoader(unlabelled, batch_size=None)

    data.__class__ = Unlabelled
    settings = {**QUIET, "logger": TensorBoardLogger(tmp_path, "", "")}
    trainer = Trainer(**settings, max_epochs=1, callbacks=pictures(tmp_path))
    trainer.fit(DistillationModule(gpt2(16), gpt2(24), max_new_tokens=6), data)
    tags = EventAccumulator(str(tmp_path)).Reload().Tags()
    assert tags["images"] == ["head_tail_error"] and tags["tensors"] == []
