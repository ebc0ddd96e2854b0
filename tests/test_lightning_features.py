"""Which of Lightning's own features work with the module: what each of them does, not that nothing is raised."""

import copy
import csv
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.callbacks import (
    BatchSizeFinder,
    EarlyStopping,
    EMAWeightAveraging,
    GradientAccumulationScheduler,
    LearningRateFinder,
    LearningRateMonitor,
    ModelCheckpoint,
    StochasticWeightAveraging,
    WeightAveraging,
)
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.profilers import AdvancedProfiler, PyTorchProfiler, SimpleProfiler
from lightning.pytorch.tuner import Tuner
from torch import Tensor
from transformers import AutoModelForCausalLM

from akl_lightning.callbacks import LastCheckpoint, StudentExport
from akl_lightning.data.module import InstructionDataModule
from akl_lightning.errors import UsageError
from akl_lightning.module import DistillationModule
from tests.conftest import QUIET
from tests.test_module import loader, module, parameters, samples, stack

ADAM = {"optimizer": lambda parameters: torch.optim.AdamW(parameters, 1e-2)}


class Watch(Callback):
    """Remember what each epoch and each optimizer step saw."""

    def __init__(self) -> None:
        self.epochs: list[Tensor] = []
        self.rates: list[float] = []
        self.batches: list[tuple[int, list[int]]] = []
        self.losses: list[float] = []
        self.validated = 0

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: Any, outputs: Any, batch: dict[str, Tensor], batch_idx: int
    ) -> None:
        self.rates.append(trainer.optimizers[0].param_groups[0]["lr"])
        self.losses.append(outputs["loss"].item() / len(outputs["statistics"]["loss"]))
        # The step that this batch belongs to, which its last micro-batch has just ended.
        step = trainer.global_step - (not pl_module.in_step)
        self.batches.append((step, batch.get("index", torch.tensor([])).tolist()))

    def on_validation_batch_end(self, trainer: Trainer, *_: Any) -> None:
        self.validated += not trainer.sanity_checking

    def on_train_epoch_end(self, trainer: Trainer, pl_module: Any) -> None:
        self.epochs.append(parameters(pl_module.student))


def fit(
    module_: DistillationModule, data: Any, *callbacks: Callback, ckpt_path: Any = None, **settings: Any
) -> Trainer:
    trainer = Trainer(**{**QUIET, "max_epochs": 3, **settings}, callbacks=list(callbacks))
    trainer.fit(module_, data, ckpt_path=ckpt_path)
    return trainer


# --------------------------------------------------------------------------------------------------------------------
# What watches a run


def test_early_stopping_ends_the_run(data: InstructionDataModule) -> None:
    # Up the gradient, so that nothing gets better.
    module_ = module(optimizer=lambda parameters: torch.optim.SGD(parameters, 0.5, maximize=True))
    stopping = EarlyStopping("val/divergence", patience=2)
    assert fit(module_, data, stopping, max_epochs=9).current_epoch == 3
    assert stopping.stopped_epoch == 2


def test_model_checkpoint_keeps_the_best_by_a_monitor(data: InstructionDataModule, tmp_path: Path) -> None:
    module_ = module(optimizer=lambda parameters: torch.optim.SGD(parameters, 0.5, maximize=True))
    best, watch = ModelCheckpoint(tmp_path, monitor="val/fkl", filename="{epoch}"), Watch()
    fit(module_, data, best, watch, enable_checkpointing=True)
    assert Path(best.best_model_path).name == "epoch=0.ckpt"
    state = torch.load(best.best_model_path, weights_only=True)["state_dict"]
    weights = torch.cat([state[f"student.{n}"].flatten() for n, _ in module_.student.named_parameters()])
    assert torch.equal(weights.double(), watch.epochs[0])


def test_learning_rate_monitor_logs_the_schedule(data: InstructionDataModule, tmp_path: Path) -> None:
    watch, logger = Watch(), CSVLogger(tmp_path)
    module_ = module(lr_scheduler="cosine", warmup_steps=3)
    fit(module_, data, watch, LearningRateMonitor("step"), logger=logger, log_every_n_steps=1)
    rows = list(csv.DictReader((Path(logger.log_dir) / "metrics.csv").open()))
    logged = [float(row["lr-SGD"]) for row in rows if row["lr-SGD"]]
    assert len(logged) == 21 and logged[0] == 0 and max(logged) == pytest.approx(0.5)
    assert logged[1:] == pytest.approx(watch.rates[:-1], rel=1e-3), "a step's rate is the one that was set before it"


@pytest.mark.parametrize("kind", [SimpleProfiler, AdvancedProfiler, PyTorchProfiler])
def test_profilers_write_what_took_how_long(kind: Any, data: InstructionDataModule, tmp_path: Path) -> None:
    profiler = kind(dirpath=tmp_path, filename="times")
    trainer = fit(module(), data, profiler=profiler, max_steps=6, limit_val_batches=0)
    assert trainer.global_step == 6
    if kind is PyTorchProfiler:
        (trace,) = tmp_path.glob("*.json")
        names = {event.get("name", "") for event in json.loads(trace.read_text())["traceEvents"]}
        assert any("DistillationModule.optimizer_step" in name or "training_step" in name for name in names)
        assert any("aten::" in name for name in names)
    else:
        (report,) = tmp_path.glob("*.txt")
        assert "training_step" in report.read_text()


# --------------------------------------------------------------------------------------------------------------------
# Less of a run


def test_fast_dev_run_is_one_step_and_writes_nothing(
    data: InstructionDataModule, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    watch, module_ = Watch(), module()
    before = parameters(module_.student)
    best = ModelCheckpoint(tmp_path / "checkpoints", monitor="val/fkl")
    settings = {"enable_checkpointing": True, "logger": True, "fast_dev_run": True}
    trainer = fit(module_, data, watch, best, LastCheckpoint(tmp_path / "checkpoints"), **settings)
    assert (trainer.global_step, len(watch.rates), watch.validated) == (1, 1, 1)
    assert not torch.equal(parameters(module_.student), before)
    assert not list(tmp_path.rglob("*.ckpt"))


def test_limits_cut_every_loop(data: InstructionDataModule) -> None:
    watch, module_ = Watch(), module(max_new_tokens=4)
    trainer = fit(module_, data, watch, max_epochs=2, limit_train_batches=3, limit_val_batches=0)
    assert trainer.global_step == len(watch.rates) == 6
    assert watch.validated == 0
    data.batch_size, data.max_prompt_length = 2, 30
    watch = Watch()
    fit(module_, data, watch, max_epochs=1, limit_train_batches=0.5, limit_val_batches=1)
    assert len(watch.rates) == 7 and watch.validated == 1
    trainer = Trainer(**QUIET, limit_test_batches=1, limit_predict_batches=1)
    trainer.test(module_, data, verbose=False)
    assert trainer.num_test_batches == [1]
    assert [len(answers) for answers in trainer.predict(module_, data)] == [2]


def test_overfit_batches_takes_the_same_samples_again_and_learns_them(data: InstructionDataModule) -> None:
    watch = Watch()
    fit(module(**ADAM), data, watch, overfit_batches=2, max_epochs=12)
    batches = [sorted(indices) for _, indices in watch.batches]
    assert batches == batches[:2] * 12 and batches[0] != batches[1]
    assert watch.losses[-1] < watch.losses[0] - 1


# --------------------------------------------------------------------------------------------------------------------
# Accumulation that changes


def test_an_accumulation_schedule_changes_steps_but_not_their_samples(data: InstructionDataModule) -> None:
    data.batch_size = 2
    scheduled = Watch()
    fit(module(), data, scheduled, GradientAccumulationScheduler({0: 1, 1: 4}), max_epochs=2)

    def steps(watch: Watch) -> list[list[int]]:
        members: dict[int, list[int]] = {}
        for step, indices in watch.batches:
            members.setdefault(step, []).extend(indices)
        return [sorted(indices) for indices in members.values()]

    assert [len(step) for step in steps(scheduled)] == [2] * 14 + [8, 8, 8, 4]
    # The second epoch's steps are those of a run that has accumulated from the start.
    plain = Watch()
    fit(module(), data, plain, max_epochs=2, accumulate_grad_batches=4)
    assert steps(scheduled)[14:] == steps(plain)[4:]


def test_an_accumulation_schedule_divides_by_the_tokens_of_each_step() -> None:
    rows = samples()
    batches = [stack(rows[index : index + 2]) for index in range(0, 8, 2)]
    ours, whole = module(), module()
    fit(ours, loader(batches), GradientAccumulationScheduler({0: 1, 1: 4}), max_epochs=2)
    fit(whole, loader(batches), max_epochs=1)
    fit(whole, loader([stack(rows)]), max_epochs=1)
    start = parameters(module().student)
    assert (parameters(ours.student) - parameters(whole.student)).norm() < 1e-5 * (parameters(ours) - start).norm()


def test_an_accumulation_schedule_is_resumed_within_an_epoch(data: InstructionDataModule, tmp_path: Path) -> None:
    data.batch_size = 2

    class Keep(Callback):
        def on_train_batch_end(self, trainer: Trainer, pl_module: Any, *_: Any) -> None:
            if trainer.global_step == 16 and not pl_module.in_step:
                trainer.save_checkpoint(tmp_path / "16.ckpt")

    def schedule() -> Callback:
        return GradientAccumulationScheduler({0: 1, 1: 4})

    whole, resumed = module(**ADAM), module(**ADAM)
    fit(whole, data, schedule(), Keep(), max_epochs=3)
    fit(resumed, data, schedule(), max_epochs=3, ckpt_path=tmp_path / "16.ckpt")
    assert torch.equal(parameters(resumed.student), parameters(whole.student))


def test_a_schedule_that_spans_the_run_counts_its_changing_steps(data: InstructionDataModule) -> None:
    watch = Watch()
    scheduled = module(lr_scheduler="linear")
    trainer = fit(scheduled, data, watch, GradientAccumulationScheduler({0: 1, 1: 4}), max_epochs=2)
    assert trainer.global_step == 7 + 2
    rates = dict(zip([step for step, _ in watch.batches], watch.rates, strict=True))
    assert list(rates.values()) == pytest.approx([0.5 * (1 - step / 9) for step in range(1, 10)], abs=1e-6)
    with pytest.raises(UsageError, match="the schedule 'linear' spans the whole run, which has no end that is known"):
        fit(module(lr_scheduler="linear"), data, max_epochs=-1)


# --------------------------------------------------------------------------------------------------------------------
# Finders


def even() -> Any:
    """Batches of equally many response tokens."""
    return loader([stack(samples())] * 8)


def test_the_learning_rate_finder_sets_a_rate_and_leaves_no_trace() -> None:
    module_, watch = module(lr_scheduler="linear", warmup_steps=2), Watch()
    finder = LearningRateFinder(1e-4, 10.0, 40)
    trainer = fit(module_, even(), finder, watch, max_epochs=6)
    found = finder.optimal_lr.suggestion()
    assert 1e-3 < found < 5 and module_.lr == found
    assert len(finder.optimal_lr.results["lr"]) >= 20
    assert max(watch.rates) == pytest.approx(found, rel=0.02), "the schedule is that of the rate found"
    assert watch.rates[0] == pytest.approx(found / 2, rel=1e-3), "with its warm-up"
    # The run is that of the rate found from the start.
    twin = module(lr_scheduler="linear", warmup_steps=2)
    twin.lr = found
    other = fit(twin, even(), max_epochs=6)
    assert torch.equal(parameters(module_.student), parameters(twin.student))
    assert trainer.callback_metrics == other.callback_metrics


def test_the_tuner_finds_a_rate_for_the_next_fit() -> None:
    module_, watch = module(), Watch()
    trainer = Trainer(**QUIET, max_epochs=6, callbacks=[watch])
    found = Tuner(trainer).lr_find(module_, even(), min_lr=1e-4, max_lr=10.0, num_training=40).suggestion()
    trainer.fit(module_, even())
    assert watch.rates[0] == found == module_.lr


def test_the_learning_rate_finder_wants_batches_that_compare(data: InstructionDataModule) -> None:
    with pytest.raises(
        UsageError, match=r"LearningRateFinder compares the summed losses .* set data.group_by_length to f"
    ):
        fit(module(), data, LearningRateFinder())
    data.group_by_length = False
    finder = LearningRateFinder(1e-4, 10.0, 40)
    fit(module(), data, finder, max_epochs=6)
    assert 1e-4 < finder.optimal_lr.suggestion() < 10


def test_the_batch_size_finder_doubles_until_the_memory_is_full(data: InstructionDataModule) -> None:
    class Small(DistillationModule):
        """A device with room for 11 rows."""

        def training_step(self, batch: Any, batch_idx: int) -> dict[str, Any]:
            if len(batch["labels"]) > 11:
                raise RuntimeError("CUDA out of memory.")
            return super().training_step(batch, batch_idx)

    start = module(**ADAM)
    module_ = Small(copy.deepcopy(start.student.model), start.teacher.model, **ADAM)
    finder, watch = BatchSizeFinder(init_val=2, steps_per_trial=2), Watch()
    trainer = fit(module_, data, finder, watch, max_epochs=2)
    assert finder.optimal_batch_size == data.batch_size == 8
    assert [len(indices) for _, indices in watch.batches] == [8, 8, 8, 4] * 2
    other = fit(start, data, max_epochs=2)
    assert torch.equal(parameters(module_.student), parameters(start.student)), "the search leaves no trace"
    assert trainer.callback_metrics == other.callback_metrics


# --------------------------------------------------------------------------------------------------------------------
# Averages of weights


def test_swa_averages_the_last_epochs_and_never_copies_the_teacher(data: InstructionDataModule) -> None:
    module_, watch = module(**ADAM), Watch()
    swa = StochasticWeightAveraging(1e-2, swa_epoch_start=2)
    fit(module_, data, swa, watch, max_epochs=4)
    # It takes what it finds when an epoch begins: the weights after epochs 1, 2 and 3.
    expected = torch.stack(watch.epochs[:3]).mean(0)
    assert (parameters(module_.student) - expected).norm() < 1e-6 * expected.norm()
    assert not torch.allclose(parameters(module_.student), watch.epochs[-1])
    assert swa._average_model.teacher is module_.teacher
    assert swa._average_model.student is not module_.student


def averaged(kind: str) -> WeightAveraging:
    return EMAWeightAveraging(decay=0.5) if kind == "EMA" else WeightAveraging()


@pytest.mark.parametrize("kind", ["mean", "EMA"])
def test_averages_are_validated_kept_exported_and_resumed(
    kind: str, data: InstructionDataModule, tmp_path: Path
) -> None:
    class Steps(Callback):
        def __init__(self) -> None:
            self.average: Tensor | None = None
            self.count = 0

        def on_train_batch_end(self, trainer: Trainer, pl_module: Any, *_: Any) -> None:
            now, self.count = parameters(pl_module.student), self.count + 1
            share = 0.5 if kind == "EMA" else 1 / self.count
            self.average = now if self.average is None else self.average + share * (now - self.average)

    averaging, steps = averaged(kind), Steps()
    export, last = StudentExport(str(tmp_path / "student")), LastCheckpoint(tmp_path / "one")
    whole = module(**ADAM)
    fit(whole, data, averaging, steps, export, max_epochs=2)
    assert averaging._average_model.module.teacher is whole.teacher
    bound = 1e-5 * steps.average.norm()
    assert (parameters(whole.student) - steps.average).norm() < bound
    assert (parameters(AutoModelForCausalLM.from_pretrained(export.exported)) - steps.average).norm() < bound

    fit(module(**ADAM), data, averaged(kind), last, max_epochs=1, enable_checkpointing=True)
    resumed = module(**ADAM)
    fit(resumed, data, averaged(kind), max_epochs=2, ckpt_path=last.path)
    assert torch.equal(parameters(resumed.student), parameters(whole.student))


def test_what_averages_stands_before_what_exports(data: InstructionDataModule, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"StudentExport stands before EMAWeightAveraging .* list it after"):
        fit(module(), data, StudentExport(str(tmp_path / "student")), EMAWeightAveraging())


@pytest.mark.parametrize("callback", [StochasticWeightAveraging(1e-2), WeightAveraging(), EMAWeightAveraging()])
def test_a_sharded_student_is_not_averaged(callback: Callback, data: InstructionDataModule) -> None:
    with pytest.raises(UsageError, match=f"{type(callback).__name__} cannot average a sharded student: use .* ddp"):
        fit(module(), data, callback, strategy="fsdp2", devices=1)
