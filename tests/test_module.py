import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningDataModule, Trainer
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint
from lightning.pytorch.plugins.precision import MixedPrecision
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from akl_lightning.criterion import DistillationCriterion
from akl_lightning.data.module import InstructionDataModule
from akl_lightning.divergences import ForwardKL
from akl_lightning.errors import UsageError
from akl_lightning.module import DistillationModule
from akl_lightning.token_mean import StepMean
from tests import references
from tests.conftest import QUIET, Bigram, gpt2, write

SGD = {"optimizer": lambda parameters: torch.optim.SGD(parameters, 0.5)}
NAMES = (
    "loss",
    "divergence",
    "cross_entropy",
    "fkl",
    "rkl",
    "head_error",
    "tail_error",
    "head_weight",
    "top1_agreement",
)


class Rows(torch.utils.data.Dataset):
    """Batches made by hand."""

    def __init__(self, batches: list[dict[str, Tensor]]) -> None:
        self.batches = batches

    def __len__(self) -> int:
        return len(self.batches)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return self.batches[index]


def loader(batches: list[dict[str, Tensor]]) -> torch.utils.data.DataLoader:
    return torch.utils.data.DataLoader(Rows(batches), batch_size=None)


def samples(count: int = 8, length: int = 24) -> list[dict[str, Tensor]]:
    """Single rows of very unequal numbers of response tokens, padded to one length."""
    generator = torch.Generator().manual_seed(3)
    rows = []
    for index in range(count):
        ids = torch.randint(1, 300, (1, length), generator=generator)
        tokens = 1 + index * (length - 4) // count
        labels, mask = ids.clone(), torch.ones_like(ids)
        labels[:, :2], labels[:, 2 + tokens :], mask[:, 2 + tokens :] = -100, -100, 0
        rows.append({"input_ids": ids, "attention_mask": mask, "labels": labels})
    return rows


def stack(rows: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    return {key: torch.cat([row[key] for row in rows]) for key in rows[0]}


def unlabelled(batch: dict[str, Tensor]) -> dict[str, Tensor]:
    return {**batch, "labels": torch.full_like(batch["labels"], -100)}


def module(**changed: Any) -> DistillationModule:
    torch.manual_seed(1)
    return DistillationModule(**{"student": gpt2(16), "teacher": gpt2(24), **SGD, **changed})


def parameters(module: nn.Module) -> Tensor:
    return torch.cat([parameter.detach().flatten() for parameter in module.parameters()]).double()


# --------------------------------------------------------------------------------------------------------------------
# The teacher


def test_nothing_that_walks_over_the_module_meets_the_teacher(data: InstructionDataModule, tmp_path: Path) -> None:
    module_ = module()
    teacher = module_.teacher.model
    before = parameters(teacher)
    trainer = Trainer(**QUIET, max_epochs=1)
    trainer.fit(module_, data)
    trainer.save_checkpoint(tmp_path / "one.ckpt")

    mine = {id(parameter) for parameter in teacher.parameters()}
    assert not mine & {id(parameter) for parameter in module_.parameters()}
    assert not mine & {id(p) for group in trainer.optimizers[0].param_groups for p in group["params"]}
    assert not any("teacher" in name for name in torch.load(tmp_path / "one.ckpt", weights_only=True)["state_dict"])
    assert all(parameter.grad is None and not parameter.requires_grad for parameter in teacher.parameters())
    assert torch.equal(parameters(teacher), before)
    assert copy.deepcopy(module_).teacher is module_.teacher
    assert not any(layer.training for layer in teacher.modules())
    module_.train()
    assert not any(layer.training for layer in teacher.modules())


def test_the_teacher_has_no_dropout_even_if_somebody_calls_train() -> None:
    teacher = gpt2(24)
    for layer in teacher.modules():
        if isinstance(layer, nn.Dropout):
            layer.p = 0.5
    module_ = module(teacher=teacher)
    teacher.train()
    batch = stack(samples())
    first, second = (module_.distill(batch).statistics["fkl"] for _ in range(2))
    assert torch.equal(first, second)


def test_the_teacher_follows_the_module() -> None:
    moved = []
    module_ = module()
    module_.teacher.to = moved.append  # type: ignore[method-assign]
    module_.to("cpu")
    assert moved == [torch.device("cpu")]


# --------------------------------------------------------------------------------------------------------------------
# The loss and what is logged


class Recorder(Callback):
    def __init__(self) -> None:
        self.steps = 0

    def on_train_batch_start(self, *_: Any) -> None:
        self.steps += 1


def train(batches: list[dict[str, Tensor]], epochs: int = 3, **settings: Any) -> Tensor:
    module_ = module()
    Trainer(**QUIET, max_epochs=epochs, **settings).fit(module_, loader(batches))
    return parameters(module_.student)


@pytest.mark.parametrize("clip", [None, 0.1])
def test_the_update_does_not_depend_on_how_samples_are_split(clip: float | None) -> None:
    rows = samples()
    whole = train([stack(rows)], gradient_clip_val=clip)
    split = train([stack(rows[i : i + 2]) for i in range(0, 8, 2)], accumulate_grad_batches=4, gradient_clip_val=clip)
    # The last window of an epoch is shorter than four.
    partial = train([stack(rows[:3]), stack(rows[3:])], accumulate_grad_batches=4, gradient_clip_val=clip)
    assert (split - whole).norm() <= 1e-5 * whole.norm()
    assert (partial - whole).norm() <= 1e-5 * whole.norm()
    assert (train([stack(rows[:4])], gradient_clip_val=clip) - whole).norm() > 1e-3 * whole.norm()


def test_a_step_uses_the_gradient_of_the_mean_over_its_tokens() -> None:
    rows = samples()
    module_, twin = module(), module()
    Trainer(**QUIET, max_steps=1, accumulate_grad_batches=2).fit(module_, loader([stack(rows[:5]), stack(rows[5:])]))
    output = twin.distill(stack(rows))
    (output.loss / len(output.statistics["loss"])).backward()
    with torch.no_grad():
        for parameter in twin.student.parameters():
            parameter -= 0.5 * parameter.grad
    assert torch.allclose(parameters(module_.student), parameters(twin.student), atol=1e-6)


def test_a_batch_without_response_tokens_adds_nothing() -> None:
    one, two = stack(samples()[:4]), stack(samples()[4:])
    plain = train([one, two], accumulate_grad_batches=2)
    with_empty = train([one, unlabelled(one), two], accumulate_grad_batches=3)
    assert torch.allclose(plain, with_empty, atol=1e-7)
    start = parameters(module().student)
    assert torch.equal(train([unlabelled(one)]), start)


def test_a_nan_loss_stops_training_and_is_named() -> None:
    class Breaks(DistillationModule):
        def training_step(self, batch: Any, batch_idx: int) -> dict[str, Any]:
            output = super().training_step(batch, batch_idx)
            if batch_idx == 2:
                # as if the student had given NaN
                output["loss"] = output["loss"] * torch.nan
                nan = output["loss"].detach()
                self.step_mean._micro_batches[-1] = self.step_mean._micro_batches[-1]._replace(
                    loss=nan, cross_entropy=nan
                )
            return output

    module_ = Breaks(gpt2(16), gpt2(24), **SGD)
    with pytest.raises(UsageError, match=r"loss is NaN at optimizer step 2, epoch 0, batch 2"):
        Trainer(**QUIET, max_epochs=1).fit(module_, loader([stack(samples())] * 4))
    assert parameters(module_.student).isfinite().all()


def test_a_teacher_that_gives_nan_is_told_from_a_student_that_diverges() -> None:
    module_ = module()
    with torch.no_grad():
        next(module_.teacher.model.parameters()).fill_(torch.nan)
    before = parameters(module_.student)
    with pytest.raises(UsageError, match=r"batch 0; the teacher gives NaN: look at that batch, or load the teacher"):
        Trainer(**QUIET, max_epochs=1).fit(module_, loader([stack(samples())]))
    assert torch.equal(parameters(module_.student), before)


def test_losses_are_looked_at_every_step_on_a_cpu_and_at_the_end_of_an_epoch() -> None:
    looked = []

    class Counts(StepMean):
        def check(self, *args: Any, **kwargs: Any) -> None:
            looked.append(len(self._unread))
            super().check(*args, **kwargs)

    module_ = DistillationModule(gpt2(16), gpt2(24), **SGD)
    module_.step_mean = Counts()
    Trainer(**QUIET, max_epochs=1).fit(module_, loader([stack(samples())] * 3))
    assert looked == [1, 1, 1, 0]  # on the CPU at every step, and once more at the end of the epoch


def test_nan_weights_are_noticed_as_well() -> None:
    module_ = module()
    with torch.no_grad():
        next(module_.student.parameters()).fill_(torch.nan)
    with pytest.raises(UsageError, match="loss is NaN at optimizer step 0, epoch 0, batch 0; the student diverged"):
        Trainer(**QUIET, max_epochs=1).fit(module_, loader([stack(samples())]))


def token_means(module_: DistillationModule, batches: Iterator[dict[str, Tensor]]) -> dict[str, float]:
    """Means over response tokens from the formulas, in float64."""
    values: dict[str, list[float]] = {name: [] for name in NAMES}
    student, teacher = (copy.deepcopy(model).double().eval() for model in (module_.student, module_.teacher.model))
    for batch in batches:
        labels = batch["labels"][:, 1:]
        learnt = labels != -100
        logits = [model(batch)[:, :-1][learnt] for model in (student, teacher)]
        statistics, _, _ = references.compare(*logits, labels[learnt], "adaptive_kl")
        for name in NAMES:
            values[name] += statistics[name.replace("_error", "_gap")].tolist()
    return {name: sum(column) / len(column) for name, column in values.items()}


def test_logged_values_are_means_over_all_response_tokens(data: InstructionDataModule) -> None:
    module_ = module()
    trainer = Trainer(**QUIET, max_epochs=2)
    trainer.fit(module_, data)
    logged = trainer.callback_metrics
    names = (*NAMES, "bits_per_byte")
    assert set(logged) == {f"{stage}/{name}" for stage in ("train", "val") for name in names} | {"train/loss_step"}
    expected = token_means(module_, data.val_dataloader())
    for name in NAMES:
        assert logged[f"val/{name}"].item() == pytest.approx(expected[name], rel=1e-4, abs=1e-6)
    (tested,) = trainer.test(module_, data, verbose=False)
    assert set(tested) == {f"test/{name}" for name in names}
    expected = token_means(module_, data.test_dataloader())
    assert tested["test/fkl"] == pytest.approx(expected["fkl"], rel=1e-4)


def test_it_learns(data: InstructionDataModule) -> None:
    module_ = module(optimizer=lambda parameters: torch.optim.AdamW(parameters, 1e-2))
    (before,) = Trainer(**QUIET).validate(module_, data, verbose=False)
    trainer = Trainer(**QUIET, max_epochs=5)
    trainer.fit(module_, data)
    assert trainer.callback_metrics["val/loss"] < before["val/loss"] - 0.5


# --------------------------------------------------------------------------------------------------------------------
# Ways to give a student and a teacher


def test_models_may_be_given_in_five_ways(tmp_path: Path, data: InstructionDataModule) -> None:
    model = gpt2(16).eval()
    model.save_pretrained(tmp_path / "model")
    config = {"model_type": "gpt2", "n_layer": 1, "n_head": 2, "n_embd": 16, "n_positions": 64, "vocab_size": 300}
    batch = stack(samples())
    given = module(student=str(tmp_path / "model"), teacher=model)
    assert torch.allclose(given(batch), model(**batch).logits, atol=1e-6)
    assert given.distill(batch).statistics["fkl"].abs().max() < 1e-6
    for student, teacher in ((config, model), (Bigram(), Bigram()), (Bigram(), config), (gpt2(16), Bigram())):
        module_ = module(student=student, teacher=teacher)
        before = parameters(module_.student)
        Trainer(**QUIET, max_steps=1).fit(module_, data)
        assert not torch.equal(parameters(module_.student), before)


def test_a_padded_vocabulary_is_compared_over_the_common_part() -> None:
    student, teacher = gpt2(16), gpt2(24)
    batch = stack(samples())
    expected = module(student=student, teacher=teacher).distill(batch)
    padded = gpt2(16, vocab_size=320)
    weights = student.state_dict()
    for name in ("transformer.wte.weight", "lm_head.weight"):
        weights[name] = torch.cat([weights[name], torch.randn(20, 16)])
    padded.load_state_dict(weights)
    output = module(student=padded, teacher=teacher).distill(batch)
    for name in ("divergence", "fkl", "head_gap", "top1_agreement"):
        assert torch.allclose(output.statistics[name], expected.statistics[name], atol=1e-5), name
    assert (output.statistics["cross_entropy"] > expected.statistics["cross_entropy"]).all()
    output.loss.backward()
    assert padded.transformer.wte.weight.grad[300:].abs().max() > 0


def test_supervised_fine_tuning_needs_no_teacher(data: InstructionDataModule) -> None:
    module_ = DistillationModule(gpt2(16), criterion=DistillationCriterion(alpha=0.0))
    trainer = Trainer(**QUIET, max_epochs=1)
    trainer.fit(module_, data)
    logged = {name for name in trainer.callback_metrics if name.startswith("val/")}
    assert logged == {"val/loss", "val/cross_entropy", "val/bits_per_byte"}
    assert trainer.callback_metrics["val/loss"] == trainer.callback_metrics["val/cross_entropy"]


def test_generated_answers(data: InstructionDataModule) -> None:
    class Marked(DistillationModule):
        def predict_step(self, batch: Any, batch_idx: int) -> Tensor:
            return super().predict_step(batch, batch_idx) + 1000

    module_ = Marked(gpt2(16), gpt2(24), max_new_tokens=5)
    (answers,) = Trainer(**QUIET).predict(module_, data)
    assert answers.shape[0] == 4 and answers.shape[1] <= 5
    assert answers.min() >= 1000
    with pytest.raises(UsageError, match="Bigram has no generate method: override the module's generate"):
        Trainer(**QUIET).predict(DistillationModule(Bigram(), Bigram()), data)


# --------------------------------------------------------------------------------------------------------------------
# Optimizers, schedules, checkpoints, subclasses


def test_schedules_by_name_span_the_run_and_callables_step_by_epoch(data: InstructionDataModule) -> None:
    def rates(**settings: Any) -> list[float]:
        seen = []

        class Watch(Callback):
            def on_train_batch_end(self, trainer: Trainer, *_: Any) -> None:
                seen.append(trainer.optimizers[0].param_groups[0]["lr"])

        Trainer(**QUIET, max_epochs=2, callbacks=[Watch()]).fit(module(**settings), data)
        return seen

    cosine = rates(lr_scheduler="cosine", warmup_steps=2)
    assert len(cosine) == 14
    assert cosine[0] == pytest.approx(0.25) and cosine[1] == pytest.approx(0.5)
    assert cosine[-1] == pytest.approx(0, abs=1e-6)
    by_epoch = rates(lr_scheduler=lambda optimizer: torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.1))
    assert by_epoch[5] == pytest.approx(0.5) and by_epoch[7] == pytest.approx(0.05)


def test_a_run_resumed_from_its_checkpoint_ends_like_one_that_never_stopped(
    data: InstructionDataModule, tmp_path: Path
) -> None:
    adam = {"optimizer": lambda parameters: torch.optim.AdamW(parameters, 1e-2), "lr_scheduler": "constant"}
    whole = module(**adam)
    Trainer(**QUIET, max_epochs=3).fit(whole, data)
    stopped = Trainer(**QUIET, max_epochs=1)
    stopped.fit(module(**adam), data)
    stopped.save_checkpoint(tmp_path / "one.ckpt")
    resumed = module(**adam)
    Trainer(**QUIET, max_epochs=3).fit(resumed, data, ckpt_path=tmp_path / "one.ckpt")
    assert torch.equal(parameters(resumed.student), parameters(whole.student))


def test_load_from_checkpoint(data: InstructionDataModule, tmp_path: Path) -> None:
    config = {"model_type": "gpt2", "n_layer": 1, "n_head": 2, "n_embd": 16, "n_positions": 64, "vocab_size": 300}
    module_ = DistillationModule(config, gpt2(24), max_new_tokens=7)
    trainer = Trainer(**QUIET, max_epochs=1)
    trainer.fit(module_, data)
    trainer.save_checkpoint(tmp_path / "one.ckpt")
    loaded = DistillationModule.load_from_checkpoint(tmp_path / "one.ckpt", teacher=gpt2(24))
    assert torch.equal(parameters(loaded.student), parameters(module_.student))
    assert loaded.max_new_tokens == 7


def test_a_subclass_adds_a_loss_without_copying_a_method() -> None:
    class Decayed(DistillationModule):
        def training_step(self, batch: Any, batch_idx: int) -> dict[str, Any]:
            output = super().training_step(batch, batch_idx)
            tokens = output["statistics"]["loss"].numel()
            norm = sum(parameter.square().sum() for parameter in self.student.parameters())
            output["loss"] = output["loss"] + 0.5 * tokens * norm
            return output

    batch = stack(samples())
    zero = DistillationCriterion(ForwardKL(), alpha=1.0)
    plain, decayed = module(criterion=zero), Decayed(gpt2(16), gpt2(24), criterion=zero, **SGD)
    decayed.load_state_dict(plain.state_dict())
    decayed.teacher.model.load_state_dict(plain.teacher.model.state_dict())
    start = parameters(plain.student)
    for module_ in (plain, decayed):
        Trainer(**QUIET, max_steps=1).fit(module_, loader([batch]))
    # SGD with rate 0.5 on half the squared norm takes away half of each parameter.
    assert torch.allclose(parameters(plain.student) - parameters(decayed.student), 0.5 * start, atol=1e-6)


# --------------------------------------------------------------------------------------------------------------------
# Bad input


def must_stop_before_training(module_: DistillationModule, data: Any, message: str) -> None:
    recorder = Recorder()
    with pytest.raises(UsageError, match=message):
        Trainer(**QUIET, max_epochs=1, callbacks=[recorder]).fit(module_, data)
    assert recorder.steps == 0


def test_teacher_and_student_with_other_tokens(tokenizer, tmp_path: Path) -> None:
    for name in ("teacher", "student"):
        other = copy.deepcopy(tokenizer)
        if name == "student":
            other.add_tokens(["<extra>"])
        other.save_pretrained(tmp_path / name)
        gpt2(16, vocab_size=310).save_pretrained(tmp_path / name)
    message = r"disagree on the vocabulary at 1 tokens: '<extra>' is missing from the teacher's and id 300 in the stud"
    with pytest.raises(UsageError, match=message):
        DistillationModule(str(tmp_path / "student"), str(tmp_path / "teacher"), alignment="refuse")
    # A student without a tokenizer of its own: the data's counts.


def test_models_and_data_that_do_not_fit(tokenizer, corpus: str, data: InstructionDataModule) -> None:
    must_stop_before_training(
        module(student=gpt2(16, vocab_size=290)), data, r"the student has no output for the token .* \(id 290\)"
    )
    must_stop_before_training(
        module(teacher=gpt2(16, positions=32)), data, r"max_length = 40 is beyond the 32 positions of the teacher: set"
    )
    must_stop_before_training(
        module(student=gpt2(16, vocab_size=310)), loader([stack(samples())]), "no tokenizer tells whether token 300"
    )
    with pytest.raises(UsageError, match=r"model.max_new_tokens = 64 are beyond the 64 positions of the model"):
        Trainer(**QUIET).predict(module(max_new_tokens=64), data)


def test_a_missing_key_is_named() -> None:
    batch = stack(samples())
    del batch["attention_mask"]
    with pytest.raises(UsageError, match=r"the batch has no 'attention_mask', only \['input_ids', 'labels'\]"):
        Trainer(**QUIET, max_epochs=1).fit(module(), loader([batch]))


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("input_ids", 300, r"holds the token 300, and the student knows those from 0 to 299: let the DataLoader give"),
        ("input_ids", -1, r"holds the token -1, and the student knows those from 0"),
        ("labels", 301, r"holds the label 301, and the student has outputs from 0 to 299"),
        ("labels", -1, r"holds the label -1, and .* or -100 where nothing is to be learnt"),
    ],
)
def test_a_batch_that_no_model_knows_is_one_sentence(key: str, value: int, message: str) -> None:
    batch = stack(samples())
    batch[key][3, 3] = value
    with pytest.raises(UsageError, match=message):
        Trainer(**QUIET, max_epochs=1).fit(module(), loader([batch]))


def test_a_batch_of_another_shape_is_one_sentence() -> None:
    batch = stack(samples())
    for key, odd in (("labels", batch["labels"][:, :-1]), ("labels", batch["labels"].float()), ("input_ids", 0)):
        wrong = {**batch, key: batch[key][0] if isinstance(odd, int) else odd}
        with pytest.raises(UsageError, match=r"let them be integers of one shape, \[batch, length\]"):
            module().distill(wrong)
    with pytest.raises(UsageError, match="a sample of 24 tokens is beyond the 16 positions of the teacher: cut it"):
        module(teacher=gpt2(16, positions=16)).distill({**batch, "attention_mask": torch.ones_like(batch["labels"])})


def test_models_that_cannot_be_had() -> None:
    with pytest.raises(UsageError, match=r"cannot load the student 'nobody/nothing'.*path of a local folder"):
        DistillationModule("nobody/nothing", gpt2())
    with pytest.raises(UsageError, match="has no model_type"):
        DistillationModule({"n_layer": 2}, gpt2())
    with pytest.raises(UsageError, match="knows no model_type 'gpt9'"):
        DistillationModule({"model_type": "gpt9"}, gpt2())
    with pytest.raises(UsageError, match=r"criterion\.alpha = 0\.5 needs a teacher: give one, or set alpha to 0"):
        DistillationModule(gpt2())


def test_exported_weights_are_the_students(tmp_path: Path) -> None:
    module_ = module()
    module_.student.model.save_pretrained(tmp_path / "student")
    batch = stack(samples())
    assert torch.equal(AutoModelForCausalLM.from_pretrained(tmp_path / "student")(**batch).logits, module_(batch))


# --------------------------------------------------------------------------------------------------------------------
# Precision


def fitted(**settings: Any) -> DistillationModule:
    module_ = module(optimizer=lambda parameters: torch.optim.SGD(parameters, 0.05))
    batches = [stack(samples()[:4]), stack(samples()[4:])]
    Trainer(**QUIET, max_epochs=2, accumulate_grad_batches=2, **settings).fit(module_, loader(batches))
    return module_


def float16() -> MixedPrecision:
    # On a CPU the Trainer's flag silently means bfloat16. The default scale of 65536 would be halved, step by skipped
    # step, until the summed loss no longer overflows.
    return MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu", init_scale=64.0))


@pytest.mark.parametrize(
    "precision", ["bf16-mixed", "bf16-true", float16()], ids=["bf16-mixed", "bf16-true", "16-mixed"]
)
def test_precisions_of_the_trainer(precision: Any) -> None:
    settings = {"precision": precision} if isinstance(precision, str) else {"plugins": [precision]}
    start, expected = parameters(module().student), parameters(fitted().student)
    ours = fitted(**settings)
    assert next(ours.student.parameters()).dtype == (torch.bfloat16 if precision == "bf16-true" else torch.float32)
    update = parameters(ours.student) - (start.bfloat16().double() if precision == "bf16-true" else start)
    # Weights in bfloat16 round away most of a small step; the bound of the others is that of their products.
    bound = 0.5 if precision == "bf16-true" else 0.03
    assert (update - (expected - start)).norm() <= bound * (expected - start).norm()


# --------------------------------------------------------------------------------------------------------------------
# One fit after another


def test_a_fit_that_was_broken_off_leaves_nothing_behind() -> None:
    class Breaks(DistillationModule):
        broken = False

        def training_step(self, batch: Any, batch_idx: int) -> dict[str, Any]:
            if batch_idx == 3 and not self.broken:
                self.broken = True
                raise KeyError("half of a step is done")
            return super().training_step(batch, batch_idx)

    torch.manual_seed(1)
    rows, start = samples(), gpt2(16)
    module_ = Breaks(copy.deepcopy(start), teacher := gpt2(24), **SGD)
    fresh = DistillationModule(start, teacher, **SGD)
    batches = [stack(rows[i : i + 2]) for i in range(0, 8, 2)]
    settings = {**QUIET, "max_epochs": 1, "accumulate_grad_batches": 4}
    with pytest.raises(KeyError):
        Trainer(**settings).fit(module_, loader(batches))
    module_.stop_requested = module_.stop_agreed = True
    trainers = [Trainer(**settings), Trainer(**settings)]
    trainers[0].fit(module_, loader(batches))
    trainers[1].fit(fresh, loader(batches))
    assert torch.equal(parameters(module_.student), parameters(fresh.student))
    assert trainers[0].callback_metrics["train/fkl"] == trainers[1].callback_metrics["train/fkl"]
    assert not module_.stop_agreed


def test_a_checkpoint_loaded_for_a_test_leaves_training_alone(tmp_path: Path, data: InstructionDataModule) -> None:
    module_ = module()
    trainer = Trainer(**QUIET, max_epochs=1)
    trainer.fit(module_, data)
    trainer.save_checkpoint(tmp_path / "one.ckpt")
    Trainer(**QUIET).test(module_, data, ckpt_path=tmp_path / "one.ckpt", verbose=False)
    assert module_.resume._random_states == []
    assert not any(metric.update_called for metric in module_.train_metrics.values())


def test_a_checkpoint_within_an_epoch_wants_the_same_split(tmp_path: Path, data: InstructionDataModule) -> None:
    module_ = module()
    trainer = Trainer(**QUIET, max_steps=2)
    trainer.fit(module_, data)
    trainer.save_checkpoint(tmp_path / "two steps.ckpt")
    data.batch_size = 2
    with pytest.raises(
        UsageError, match=r"4 samples per device × 1 device × 1 accumulated, not 2 samples per device × 1 device"
    ):
        Trainer(**QUIET, max_steps=4).fit(module(), data, ckpt_path=tmp_path / "two steps.ckpt")


# --------------------------------------------------------------------------------------------------------------------
# Several sets of samples


class TwoSets(LightningDataModule):
    """Validation and test samples of two kinds."""

    def __init__(self, sets: Any) -> None:
        super().__init__()
        self.sets = sets

    def train_dataloader(self) -> torch.utils.data.DataLoader:
        return loader([stack(samples())])

    def val_dataloader(self) -> Any:
        return self.sets

    test_dataloader = val_dataloader


SETS = [[stack(samples()[:2]), stack(samples()[2:3])], [stack(samples()[3:])], [stack(samples()[6:])]]


@pytest.mark.parametrize("kind", ["mapping", "list"])
def test_each_set_of_samples_is_logged_under_its_name(kind: str, tmp_path: Path) -> None:
    names = ["news", "code.v1", "chat"] if kind == "mapping" else ["0", "1", "2"]
    loaders = [loader(batches) for batches in SETS]
    data = TwoSets(dict(zip(names, loaders, strict=True)) if kind == "mapping" else loaders)
    module_ = module()
    best = ModelCheckpoint(tmp_path, monitor=f"val/{names[1]}/divergence", save_top_k=2, filename="{epoch}")
    settings = {**QUIET, "enable_checkpointing": True}
    trainer = Trainer(**settings, max_epochs=2, callbacks=[best, EarlyStopping("val/divergence")])
    trainer.fit(module_, data)
    (logged,) = {frozenset(trainer.callback_metrics)}
    expected = {f"val/{name}" for name in NAMES} | {f"val/{one}/{name}" for one in names for name in NAMES}
    assert {name for name in logged if name.startswith("val/")} == expected
    scores = [score.item() for score in best.best_k_models.values()]
    assert len(scores) == 2 and trainer.callback_metrics[f"val/{names[1]}/divergence"].item() in scores
    for stage, values in (("val", trainer.callback_metrics), ("test", trainer.test(module_, data, verbose=False)[0])):
        for one, batches in zip(names, SETS, strict=True):
            by_hand = token_means(module_, batches)
            for name in NAMES:
                assert float(values[f"{stage}/{one}/{name}"]) == pytest.approx(by_hand[name], rel=1e-4, abs=1e-6)
        assert float(values[f"{stage}/fkl"]) == float(values[f"{stage}/{names[0]}/fkl"])
    # One set behind several, and others behind a fit.
    (alone,) = trainer.validate(module_, loaders[1], verbose=False)
    assert set(alone) == {f"val/{name}" for name in NAMES}
    assert alone["val/fkl"] == pytest.approx(token_means(module_, SETS[1])["fkl"], rel=1e-4)
    other = trainer.validate(module_, {"a": loaders[2], "b": loaders[0]}, verbose=False)
    assert other[0]["val/b/fkl"] == pytest.approx(token_means(module_, SETS[0])["fkl"], rel=1e-4)


def test_a_cache_holds_every_set(tmp_path: Path) -> None:
    data = TwoSets({"news": loader(SETS[0]), "code": loader(SETS[1])})
    module_ = module(teacher=write(gpt2(24), tmp_path / "cache", data))
    Trainer(**QUIET, max_epochs=1).fit(module_, data)


# --------------------------------------------------------------------------------------------------------------------
# Steps that return less


class LossAlone(DistillationModule):
    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return super().training_step(batch, batch_idx)["loss"]


class OwnStep(DistillationModule):
    """Compares, and returns a mapping without statistics."""

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return {"loss": self.distill(batch).loss}


class LeavesOut(DistillationModule):
    """Returns nothing for some batches, as Lightning understands it: they are left out."""

    left_out: tuple[int, ...] = ()

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        output = super().training_step(batch, batch_idx)
        return None if batch_idx in self.left_out else output


@pytest.mark.parametrize("kind", [LossAlone, OwnStep])
def test_a_step_may_return_the_loss_alone(kind: type[DistillationModule]) -> None:
    rows = samples()
    batches = [stack(rows[:5]), stack(rows[5:])]
    settings = {"max_epochs": 2, "accumulate_grad_batches": 2}
    torch.manual_seed(1)
    module_ = kind(gpt2(16), gpt2(24), **SGD)
    Trainer(**QUIET, **settings).fit(module_, loader(batches))
    assert torch.equal(parameters(module_.student), train(batches, epochs=2, accumulate_grad_batches=2))


@pytest.mark.parametrize("left_out", [(0,), (1,), (2,), (1, 2), (3,)])
@pytest.mark.parametrize("window", [1, 2])
def test_a_batch_for_which_a_step_returns_nothing_counts_nothing(left_out: tuple[int, ...], window: int) -> None:
    rows = samples()
    batches = [stack(rows[start : start + 2]) for start in range(0, 8, 2)]
    torch.manual_seed(1)
    module_ = LeavesOut(gpt2(16), gpt2(24), **SGD)
    module_.left_out = left_out
    Trainer(**QUIET, max_epochs=1, accumulate_grad_batches=window).fit(module_, loader(batches))
    # Steps by hand, of the batches that are left.
    twin = module()
    for start in range(0, 4, window):
        kept = [batches[number] for number in range(start, start + window) if number not in left_out]
        if not kept:
            continue
        twin.student.zero_grad()
        outputs = [twin.distill(batch) for batch in kept]
        sum(output.loss / sum(len(one.statistics["loss"]) for one in outputs) for output in outputs).backward()
        with torch.no_grad():
            for parameter in twin.student.parameters():
                parameter -= 0.5 * parameter.grad
    assert torch.allclose(parameters(module_.student), parameters(twin.student), atol=1e-6)
    assert not module_.in_step


def test_a_batch_that_is_left_out_may_be_nan() -> None:
    class LeavesOutNan(DistillationModule):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            output = super().training_step(batch, batch_idx)
            return output if output["loss"].isfinite() else None

    class Nan(Bigram):
        def forward(self, batch: dict[str, Tensor]) -> Tensor:
            return super().forward(batch) * (torch.nan if batch["input_ids"].shape[0] == 3 else 1)

    module_ = LeavesOutNan(gpt2(16), Nan(), **SGD)
    batches = [stack(samples()[:2]), stack(samples()[2:5]), stack(samples()[5:7])]
    Trainer(**QUIET, max_epochs=1).fit(module_, loader(batches))
    assert parameters(module_.student).isfinite().all()
