"""Training on-policy: tiny models, everything recomputed by hand."""

import copy
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor

from akl_lightning.callbacks import LastCheckpoint
from akl_lightning.criterion import DistillationCriterion
from akl_lightning.data.module import InstructionDataModule
from akl_lightning.data.sources import JsonLines
from akl_lightning.divergences import ForwardKL, JensenShannon, ReverseKL
from akl_lightning.evaluation.decoding import seed_of
from akl_lightning.models.lora import LoraSettings
from akl_lightning.module import DistillationModule
from akl_lightning.rollouts import ContinuousBatching, GenerateEngine, OnPolicy, Sampling, Weights
from akl_lightning.rollouts.batches import samples_of
from akl_lightning.rollouts.sampler import EngineError
from tests import references
from tests.conftest import QUIET, gpt2
from tests.test_module import loader, parameters, samples

SHORT = Sampling(max_new_tokens=6)


def student(bias_of_end: float = 3.0) -> Any:
    """One that ends some of its answers and not others: its head is tied, so the end's embedding is moved."""
    torch.manual_seed(1)
    model = gpt2(16)
    with torch.no_grad():
        model.transformer.ln_f.bias.fill_(0.3)
        model.transformer.wte.weight[0] = bias_of_end / 4
    return model


def module(on_policy: OnPolicy | None, **changed: Any) -> DistillationModule:
    torch.manual_seed(1)
    sgd = {"optimizer": lambda parameters: torch.optim.SGD(parameters, 0.5)}
    return DistillationModule(**{"student": student(), "teacher": gpt2(24), **sgd, "on_policy": on_policy, **changed})


class Seen(Callback):
    """Keeps what the steps were given, and what they cost."""

    def __init__(self) -> None:
        self.batches: list[dict[str, Any]] = []
        self.outputs: list[Any] = []
        self.weights: list[dict[str, Tensor]] = []
        self.responses: dict[tuple[int, int], list[int]] = {}

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        assert isinstance(pl_module, DistillationModule)
        self.batches.append(batch)
        self.weights.append({name: value.clone() for name, value in pl_module.student.model.state_dict().items()})
        for row, sample in enumerate(samples_of({**batch}, -100)):
            if rolled(batch)[row]:
                key = (trainer.global_step, int(sample.number or 0))
                self.responses[key] = sample.tokens[sample.starts[-1] :]

    def on_train_batch_end(self, trainer: Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.outputs.append(outputs)


def rolled(batch: dict[str, Any]) -> Tensor:
    """Which samples of a batch are rollouts."""
    return batch["rollouts"].samples if "rollouts" in batch else torch.zeros(len(batch["labels"]), dtype=torch.bool)


def fit(
    on_policy: OnPolicy | None, data: Any, callbacks: Sequence[Callback] = (), ckpt_path: Any = None, **changed: Any
) -> tuple[DistillationModule, Seen, Trainer]:
    trainer_settings = {name: changed.pop(name) for name in list(changed) if name in ("max_epochs", "max_steps")}
    accumulate = changed.pop("accumulate", 1)
    seen = Seen()
    trainer = Trainer(
        **{
            **QUIET,
            "enable_checkpointing": bool(callbacks),
            "max_epochs": 1,
            **trainer_settings,
            "limit_val_batches": changed.pop("val_batches", 0),
        },
        accumulate_grad_batches=accumulate,
        callbacks=[seen, *callbacks],
    )
    own = module(on_policy, **changed)
    trainer.fit(own, data, ckpt_path=ckpt_path)
    return own, seen, trainer


def data_of(tokenizer: Any, corpus: str, batch_size: int = 8) -> InstructionDataModule:
    return InstructionDataModule(
        tokenizer, JsonLines(corpus), batch_size=batch_size, max_length=40, validation_size=4, test_size=4
    )


# --------------------------------------------------------------------------------------------------------------------
# What is sampled, and from what


def test_rollouts_are_drawn_from_the_weights_of_their_own_step(tokenizer: Any, corpus: str) -> None:
    _, seen, _ = fit(OnPolicy(0.5, SHORT, seed=3), data_of(tokenizer, corpus))
    assert len(seen.batches) == 4
    ended = [tokens[-1] == 0 for tokens in seen.responses.values()]
    assert any(ended) and not all(ended)
    engine = GenerateEngine()
    for step, (batch, weights) in enumerate(zip(seen.batches, seen.weights, strict=True)):
        own = module(None)
        own.student.model.load_state_dict(weights)
        engine.refresh(Weights(own.student.eval(), (0,), 0))
        found = [
            (int(sample.number or 0), sample.tokens[: sample.starts[0]], sample.tokens[sample.starts[0] :])
            for row, sample in enumerate(samples_of(batch, -100))
            if rolled(batch)[row]
        ]
        with torch.no_grad():
            again = engine.generate([p for _, p, _ in found], SHORT, [seed_of(3, "draw", step, n) for n, _, _ in found])
        for (_, _, response), answer in zip(found, again, strict=True):
            end = answer.index(0) + 1 if 0 in answer else len(answer)
            assert response == answer[:end]
            assert len(response) <= 6 and 0 not in response[:-1]
    # What is not chosen is as the data have it.
    plain = [batch for batch in data_of_rows(tokenizer, corpus)]
    for batch in seen.batches:
        for row, sample in enumerate(samples_of(batch, -100)):
            if not rolled(batch)[row]:
                assert sample.tokens in plain


def data_of_rows(tokenizer: Any, corpus: str) -> list[list[int]]:
    data = data_of(tokenizer, corpus)
    data.setup("fit")
    return [sample.tokens for batch in data.samples("train") for sample in samples_of(batch, -100)]


def test_the_choice_depends_on_seed_step_and_sample_and_has_the_share(tokenizer: Any, corpus: str) -> None:
    data = data_of(tokenizer, corpus)
    chosen = {}
    for share in (0.3, 0.6):
        _, seen, _ = fit(OnPolicy(share, Sampling(1)), data, max_epochs=5)
        chosen[share] = set(seen.responses)
        assert len(chosen[share]) / (5 * 28) == pytest.approx(share, abs=0.13)
    assert chosen[0.3] < chosen[0.6]  # a larger share has more of the same
    _, seen, _ = fit(OnPolicy(0.3, Sampling(1), seed=1), data, max_epochs=5)
    assert set(seen.responses) != chosen[0.3]
    _, seen, _ = fit(OnPolicy(1.0, Sampling(1)), data)
    assert len(seen.responses) == 28


def test_a_share_of_0_is_bit_by_bit_the_run_without(tokenizer: Any, corpus: str) -> None:
    data = data_of(tokenizer, corpus)
    with_option, _, first = fit(OnPolicy(0.0), data, val_batches=1.0)
    without, _, second = fit(None, data, val_batches=1.0)
    assert torch.equal(parameters(with_option), parameters(without))
    assert first.callback_metrics.keys() == second.callback_metrics.keys()
    assert all(first.callback_metrics[name].equal(value) for name, value in second.callback_metrics.items())


@pytest.mark.parametrize("refresh_every", [1, 2])
def test_the_same_global_batch_gives_the_same_rollouts_however_it_is_split(
    tokenizer: Any, corpus: str, refresh_every: int
) -> None:
    settings = OnPolicy(0.5, SHORT, refresh_every=refresh_every)
    whole, one, _ = fit(settings, data_of(tokenizer, corpus, 8))
    split, two, _ = fit(settings, data_of(tokenizer, corpus, 2), accumulate=4)
    assert one.responses == two.responses
    assert (parameters(whole) - parameters(split)).norm() < 1e-5 * parameters(whole).norm()


def test_rollouts_for_several_steps_come_from_the_weights_at_their_start(tokenizer: Any, corpus: str) -> None:
    calls: list[int] = []

    class Counting(GenerateEngine):
        def generate(self, prompts: Any, decoding: Any, seeds: Any) -> list[list[int]]:
            calls.append(len(prompts))
            return super().generate(prompts, decoding, seeds)

    _, seen, _ = fit(OnPolicy(1.0, SHORT, refresh_every=3, engine=Counting()), data_of(tokenizer, corpus))
    assert calls == [24, 4]  # 3 steps of 8, and the last of 4: a window ends with its epoch
    assert len(seen.responses) == 28
    # With a step of size 0 the weights are those of the start, and so are the rollouts.
    still = {"optimizer": lambda parameters: torch.optim.SGD(parameters, 0.0)}
    _, fresh, _ = fit(OnPolicy(1.0, SHORT), data_of(tokenizer, corpus), **still)
    _, ahead, _ = fit(OnPolicy(1.0, SHORT, refresh_every=3), data_of(tokenizer, corpus), **still)
    assert fresh.responses == ahead.responses


def test_the_teacher_may_answer_or_one_of_the_two(tokenizer: Any, corpus: str) -> None:
    data = data_of(tokenizer, corpus)
    own, seen, _ = fit(OnPolicy(1.0, SHORT, responses_from="teacher"), data)
    engine = GenerateEngine()
    engine.refresh(Weights(own.teacher.model.eval(), (0,), 0))
    batch = seen.batches[0]
    found = samples_of(batch, -100)
    with torch.no_grad():
        again = engine.generate(
            [sample.tokens[: sample.starts[0]] for sample in found],
            SHORT,
            [seed_of(0, "draw", 0, sample.number) for sample in found],
        )
    for sample, answer in zip(found, again, strict=True):
        end = answer.index(0) + 1 if 0 in answer else len(answer)
        assert sample.tokens[sample.starts[0] :] == answer[:end]
    assert not any(len(batch["rollouts"].own) for batch in seen.batches)
    _, mixed, _ = fit(OnPolicy(1.0, SHORT, responses_from="mix"), data)
    share = sum(len(batch["rollouts"].own) for batch in mixed.batches)
    assert 0.2 < share / sum(len(batch["rollouts"].places) for batch in mixed.batches) < 0.8


def test_prompts_alone_are_answered_in_a_plain_dataloader() -> None:
    batches = [{**row, "labels": torch.full_like(row["labels"], -100)} for row in samples(4)]
    _, seen, trainer = fit(OnPolicy(0.25, SHORT), loader(batches))
    assert all(batch["rollouts"].samples.all() for batch in seen.batches)
    assert trainer.callback_metrics["train/rollout_length"] > 1
    # The same prompt twice in a batch has two answers.
    row = {key: torch.cat([value, value]) for key, value in batches[2].items()}
    _, seen, _ = fit(OnPolicy(1.0, SHORT), loader([row]))
    first, second = samples_of(seen.batches[0], -100)
    assert first.tokens[: first.starts[0]] == second.tokens[: second.starts[0]] and first.tokens != second.tokens


def test_the_last_turn_is_answered_or_any() -> None:
    ids = torch.arange(1, 13).repeat(6, 1)
    labels = torch.full_like(ids, -100)
    labels[:, 3:5], labels[:, 8:] = ids[:, 3:5], ids[:, 8:]
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels, "index": torch.arange(6)}
    _, seen, _ = fit(OnPolicy(1.0, SHORT), loader([batch]))
    assert [sample.starts for sample in samples_of(seen.batches[0], -100)] == [[8]] * 6
    _, seen, _ = fit(OnPolicy(1.0, SHORT, turns="random"), loader([batch]))
    starts = [sample.starts for sample in samples_of(seen.batches[0], -100)]
    assert {tuple(of) for of in starts} == {(3,), (8,)}


# --------------------------------------------------------------------------------------------------------------------
# What it costs


def by_hand(
    own: DistillationModule, weights: dict[str, Tensor], batch: dict[str, Any]
) -> tuple[Tensor, Tensor, Tensor]:
    """FKL and RKL of each response token, dense in float64, and which of them are rollouts'."""
    models = gpt2(16).double(), own.teacher.model.model
    models[0].load_state_dict(weights)
    ids, mask = batch["input_ids"], batch["attention_mask"]
    with torch.no_grad():
        log_q = models[0].eval()(ids, attention_mask=mask).logits.log_softmax(-1)
        log_p = models[1](ids, attention_mask=mask).logits.double().log_softmax(-1)
    rows, places = (batch["labels"][:, 1:] != -100).nonzero(as_tuple=True)
    log_p, log_q = log_p[rows, places], log_q[rows, places]
    fkl, rkl = references.forward_kl(log_p, log_q), references.reverse_kl(log_p, log_q)
    cross_entropy = -log_q.gather(-1, batch["labels"][:, 1:][rows, places][:, None])[:, 0]
    return torch.stack([fkl, rkl, cross_entropy]), rolled(batch)[rows], rows


def test_rollouts_have_no_cross_entropy_and_the_loss_is_the_dense_one(tokenizer: Any, corpus: str) -> None:
    criterion = DistillationCriterion(ReverseKL(), alpha=0.25)
    own, seen, _ = fit(OnPolicy(0.5, SHORT), data_of(tokenizer, corpus), criterion=criterion)
    for batch, weights, outputs in zip(seen.batches, seen.weights, seen.outputs, strict=True):
        (_, rkl, cross_entropy), new, _ = by_hand(own, weights, batch)
        expected = torch.where(new, rkl, 0.25 * rkl + 0.75 * cross_entropy)
        torch.testing.assert_close(outputs["statistics"]["loss"].double(), expected, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(outputs["loss"].double(), expected.sum(), rtol=1e-4, atol=1e-4)


def test_rollouts_may_have_a_divergence_of_their_own(tokenizer: Any, corpus: str) -> None:
    criterion = DistillationCriterion(ForwardKL(), alpha=0.5)
    data = data_of(tokenizer, corpus)
    own, seen, _ = fit(OnPolicy(0.5, SHORT, divergence=ReverseKL()), data, criterion=criterion)
    for batch, weights, outputs in zip(seen.batches, seen.weights, seen.outputs, strict=True):
        (fkl, rkl, cross_entropy), new, _ = by_hand(own, weights, batch)
        expected = torch.where(new, rkl, 0.5 * fkl + 0.5 * cross_entropy)
        torch.testing.assert_close(outputs["statistics"]["loss"].double(), expected, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(outputs["statistics"]["fkl"].double(), fkl, rtol=1e-4, atol=1e-5)
    # The gradient, too: as if the two had been two micro-batches of the step.
    batch = seen.batches[0]
    other = module(OnPolicy(0.5, SHORT, divergence=ReverseKL()), criterion=criterion)
    other.distill(batch).loss.backward()
    parts = []
    for divergence, alpha, rows in ((ReverseKL(), 1.0, rolled(batch)), (ForwardKL(), 0.5, ~rolled(batch))):
        part = {key: batch[key][rows] for key in ("input_ids", "attention_mask", "labels")}
        one = module(None, criterion=DistillationCriterion(divergence, alpha=alpha))
        one.distill(part).loss.backward()
        parts.append(torch.cat([p.grad.flatten() for p in one.parameters()]))
    together = torch.cat([p.grad.flatten() for p in other.parameters()])
    torch.testing.assert_close(together, parts[0] + parts[1], rtol=1e-4, atol=1e-5)


def test_a_divergence_that_is_the_same_gives_the_same_run(tokenizer: Any, corpus: str) -> None:
    data = data_of(tokenizer, corpus)
    one, _, _ = fit(OnPolicy(0.5, SHORT), data, criterion=DistillationCriterion(JensenShannon()))
    two, _, _ = fit(
        OnPolicy(0.5, SHORT, divergence=JensenShannon()), data, criterion=DistillationCriterion(JensenShannon())
    )
    assert (parameters(one) - parameters(two)).norm() < 1e-5 * parameters(one).norm()


def test_what_is_logged_is_the_mean_over_the_rollouts(tokenizer: Any, corpus: str) -> None:
    own, seen, trainer = fit(OnPolicy(0.5, SHORT), data_of(tokenizer, corpus))
    logged = {name.removeprefix("train/"): float(value) for name, value in trainer.callback_metrics.items()}
    lengths = [len(tokens) for tokens in seen.responses.values()]
    assert logged["rollout_length"] == pytest.approx(sum(lengths) / len(lengths))
    cut = [tokens[-1] != 0 for tokens in seen.responses.values()]
    assert logged["rollout_cut"] == pytest.approx(sum(cut) / len(cut))
    found = [by_hand(own, weights, batch) for batch, weights in zip(seen.batches, seen.weights, strict=True)]
    entropies = torch.cat([values[2][new] for values, new, _ in found])
    assert logged["rollout_entropy"] == pytest.approx(entropies.mean().item(), rel=1e-4)
    nothing = torch.zeros(0, dtype=torch.int64)
    places = [batch["rollouts"].places if "rollouts" in batch else nothing for batch in seen.batches]
    for name in ("divergence", "top1_agreement"):
        values = [o["statistics"][name][place] for o, place in zip(seen.outputs, places, strict=True)]
        assert logged[f"rollout_{name}"] == pytest.approx(torch.cat(values).mean().item(), rel=1e-5)
    assert 0 < logged["sampling_share"] < 1 and logged["sampling_tokens_per_second"] > 0


def test_validation_measures_the_reverse_divergence_on_own_responses(tokenizer: Any, corpus: str) -> None:
    still = {"optimizer": lambda parameters: torch.optim.SGD(parameters, 0.0)}
    data = data_of(tokenizer, corpus, batch_size=2)
    own, _, trainer = fit(OnPolicy(0.5, SHORT, validation_samples=4), data, val_batches=1.0, **still)
    logged = float(trainer.callback_metrics["val/rollout_rkl"])
    values = []
    own.trainer.validating = True  # what is asked for as a validation asks
    for batch in data.val_dataloader():
        with torch.no_grad():
            new = own.rollouts.answered_by_student(batch, 2)
        assert all(tokens.starts for tokens in samples_of(new, -100))
        weights = {name: value.double() for name, value in own.student.model.state_dict().items()}
        new["rollouts"] = type("All", (), {"samples": torch.ones(2, dtype=torch.bool)})
        values.append(by_hand(own, weights, new)[0][1])
    assert logged == pytest.approx(torch.cat(values).mean().item(), rel=1e-4)
    _, _, again = fit(OnPolicy(0.5, SHORT, validation_samples=4), data, val_batches=1.0, max_epochs=2, **still)
    assert float(again.callback_metrics["val/rollout_rkl"]) == pytest.approx(logged, rel=1e-5)  # the same draws
    _, _, none = fit(OnPolicy(0.5, SHORT, validation_samples=0), data, val_batches=1.0)
    assert "val/rollout_rkl" not in none.callback_metrics


def test_what_continuous_batching_keeps_follows_the_training_and_goes_with_it(tokenizer: Any, corpus: str) -> None:
    likeliest, freed = Sampling(6, top_p=1e-6), []

    class Kept(ContinuousBatching):
        def release(self) -> None:
            freed.append(self._ready is not None)
            super().release()

    runs = [
        fit(OnPolicy(1.0, likeliest, engine=engine), data_of(tokenizer, corpus), val_batches=1.0)
        for engine in (Kept(0.01), GenerateEngine())
    ]
    assert len(runs[0][1].batches) == 4 and runs[0][1].responses == runs[1][1].responses
    torch.testing.assert_close(parameters(runs[0][0].student), parameters(runs[1][0].student))
    assert sum(freed) == 2  # for a validation of fewer prompts, and at the end
    copy.deepcopy(runs[0][0])  # nothing hangs on the student


def test_dropout_is_off_while_sampling_and_on_again_afterwards(tokenizer: Any, corpus: str) -> None:
    model = student()
    model.transformer.drop.p = 0.5
    modes: list[bool] = []

    class Looking(GenerateEngine):
        def generate(self, prompts: Any, decoding: Any, seeds: Any) -> list[list[int]]:
            modes.append(model.transformer.drop.training)
            return super().generate(prompts, decoding, seeds)

    own, _, _ = fit(OnPolicy(0.5, SHORT, engine=Looking()), data_of(tokenizer, corpus), student=model, val_batches=1.0)
    assert modes and not any(modes)
    assert own.student.model.transformer.drop.training


def test_lora_samples_from_the_merged_weights(tokenizer: Any, corpus: str) -> None:
    logits: list[Tensor] = []
    ids = torch.tensor([[5, 6, 7, 8]])
    own = None

    class Looking(GenerateEngine):
        def refresh(self, weights: Weights) -> None:
            super().refresh(weights)
            assert not hasattr(weights.model.model, "peft_config")
            logits.append(weights.model.model(ids).logits - own.student.model.eval()(ids).logits)
            own.student.model.train()

    own = module(OnPolicy(1.0, SHORT, engine=Looking()), lora=LoraSettings(rank=2, target_modules=["c_attn"]))
    before = {name: p.clone() for name, p in own.named_parameters()}
    Trainer(**QUIET, max_epochs=1, limit_val_batches=0).fit(own, data_of(tokenizer, corpus))
    changed = {name for name, p in own.named_parameters() if not torch.equal(p, before[name])}
    assert changed and all("lora" in name for name in changed)
    assert len(logits) == 4 and all(difference.abs().max() < 1e-5 for difference in logits)


# --------------------------------------------------------------------------------------------------------------------
# Broken off


class Break(Callback):
    def __init__(self, step: int) -> None:
        self.step = step

    def on_train_batch_start(self, trainer: Trainer, *_: Any) -> None:
        if trainer.global_step == self.step:
            raise KeyError("killed")


@pytest.mark.parametrize("step", [2, 3, 5])
def test_killed_within_a_refresh_a_run_goes_on_with_the_same_rollouts(
    tokenizer: Any, corpus: str, tmp_path: Path, step: int
) -> None:
    settings = OnPolicy(0.5, SHORT, refresh_every=3)
    data = data_of(tokenizer, corpus, 4)
    whole, undisturbed, _ = fit(settings, data, max_epochs=2, accumulate=2)
    last = LastCheckpoint(tmp_path, every_n_steps=1)
    with pytest.raises(KeyError, match="killed"):
        fit(settings, data, [last, Break(step)], max_epochs=2, accumulate=2)
    waiting = torch.load(tmp_path / "last.ckpt", weights_only=True)["rollouts"]["waiting"]
    assert waiting if step == 2 else not waiting or step == 5
    resumed, seen, _ = fit(settings, data, [], tmp_path / "last.ckpt", max_epochs=2, accumulate=2)
    assert torch.equal(parameters(resumed), parameters(whole))
    expected = {
        key: tokens for key, tokens in undisturbed.responses.items() if key[0] in {s for s, _ in seen.responses}
    }
    assert seen.responses == expected and min(s for s, _ in seen.responses) <= step


class Failing(GenerateEngine):
    """Has no more room after some calls."""

    def __init__(self, calls: int) -> None:
        super().__init__()
        self.calls = calls

    def generate(self, prompts: Any, decoding: Any, seeds: Any) -> list[list[int]]:
        self.calls -= 1
        if self.calls < 0:
            raise RuntimeError("no more\n  room")
        return super().generate(prompts, decoding, seeds)


@pytest.mark.parametrize("calls", [2, 4, 5])
def test_an_engine_that_fails_ends_the_run_in_one_sentence_and_nothing_is_lost(
    tokenizer: Any, corpus: str, tmp_path: Path, calls: int
) -> None:
    data = data_of(tokenizer, corpus)
    whole, _, _ = fit(OnPolicy(1.0, SHORT), data, max_epochs=2)
    last = LastCheckpoint(tmp_path)
    with pytest.raises(
        EngineError, match=f"step {calls}, Failing says: no more room; mend that and go on from the last"
    ):
        fit(OnPolicy(1.0, SHORT, engine=Failing(calls)), data, [last], max_epochs=2)
    assert torch.load(tmp_path / "last.ckpt", weights_only=True)["global_step"] == calls
    resumed, seen, _ = fit(OnPolicy(1.0, SHORT), data, [], tmp_path / "last.ckpt", max_epochs=2)
    assert len(seen.batches) == 8 - calls
    assert torch.equal(parameters(resumed), parameters(whole))
