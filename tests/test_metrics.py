from pathlib import Path

import pytest
import torch
from lightning.pytorch import Trainer

from akl_lightning.criterion import DistillationCriterion
from akl_lightning.metrics import HeadTailError, TokenMean, TurnErrors, distillation_metrics
from tests.conftest import QUIET
from tests.test_module import loader, module


def statistics(tokens: int) -> dict[str, torch.Tensor]:
    student, teacher = torch.randn(2, tokens, 30)
    return DistillationCriterion()(student, teacher, torch.randint(0, 30, (tokens,))).statistics


def test_means_are_over_tokens_not_batches() -> None:
    batches = [statistics(tokens) for tokens in (1, 10, 3, 0)]
    metrics = distillation_metrics("val/", with_teacher=True)
    for batch in batches:
        metrics.update(**batch)
    for name, value in metrics.compute().items():
        gap = name.removeprefix("val/").replace("_error", "_gap")
        assert value.item() == pytest.approx(torch.cat([batch[gap] for batch in batches]).double().mean().item())


def test_ranks_add_sums_and_counts() -> None:
    one, two = HeadTailError(), HeadTailError()
    first, second = statistics(2), statistics(9)
    for metric, batch in ((one, first), (two, second)):
        metric.update(head_gap=batch["head_gap"], tail_gap=batch["tail_gap"])
    one.merge_state(two)
    expected = torch.cat([first["head_gap"], second["head_gap"]]).double().mean()
    assert one.compute()["head_error"].item() == pytest.approx(expected.item())


def test_a_reset_forgets() -> None:
    metric = TokenMean("fkl")
    metric.update(fkl=torch.tensor([1.0, 2.0]))
    metric.reset()
    metric.update(fkl=torch.tensor([6.0]))
    assert metric.compute() == 6


def test_without_a_teacher_only_loss_and_cross_entropy_exist() -> None:
    metrics = distillation_metrics("train/", with_teacher=False)
    metrics.update(**DistillationCriterion(alpha=0.0)(torch.randn(4, 9), None, torch.arange(4)).statistics)
    assert set(metrics.compute()) == {"train/loss", "train/cross_entropy"}


def test_errors_of_each_turn_by_hand() -> None:
    turns = [torch.tensor(turn) for turn in ([0, 0, 2, 1], [], [1, 8, 7, 30, 2, -1])]
    batches = [statistics(len(turn)) for turn in turns]
    metric, other = TurnErrors(), TurnErrors()
    for into, batch, turn in zip((metric, other, other), batches, turns, strict=True):
        into.update(head_gap=batch["head_gap"], tail_gap=batch["tail_gap"], turn=turn.long())
    metric.merge_state(other)  # as ranks do
    heads, tails = (torch.cat([batch[gap] for batch in batches]).tolist() for gap in ("head_gap", "tail_gap"))
    # Numbers of tokens in all of the batches; the one that belongs to no turn is left out.
    tokens = {"turn_1": [0, 1], "turn_2": [3, 4], "turn_3": [2, 8], "turn_8_on": [5, 6, 7]}
    expected = {f"{name}/head_error": sum(heads[i] for i in of) / len(of) for name, of in tokens.items()}
    expected |= {f"{name}/tail_error": sum(tails[i] for i in of) / len(of) for name, of in tokens.items()}
    assert {name: value.item() for name, value in metric.compute().items()} == pytest.approx(expected)


def test_a_single_turn_is_not_told_apart() -> None:
    metric, batch = TurnErrors(), statistics(3)
    assert metric.compute() == {}
    metric.update(head_gap=batch["head_gap"], tail_gap=batch["tail_gap"])
    metric.update(head_gap=batch["head_gap"], tail_gap=batch["tail_gap"], turn=torch.zeros(3, dtype=torch.long))
    assert metric.compute() == {}


def conversations(count: int = 3, length: int = 16) -> list[dict[str, torch.Tensor]]:
    """Batches of two rows in which an assistant has one turn, and two."""
    generator = torch.Generator().manual_seed(5)
    batches = []
    for _ in range(count):
        ids = torch.randint(1, 300, (2, length), generator=generator)
        turn = torch.full_like(ids, -1)
        turn[:, 2:5], turn[1, 9:14] = 0, 1
        batches.append(
            {
                "input_ids": ids,
                "attention_mask": torch.ones_like(ids),
                "labels": ids.where(turn >= 0, -100),
                "turn": turn,
            }
        )
    return batches


@pytest.mark.parametrize("packing", [False, True])
def test_validation_and_test_log_each_turn(packing: bool, tmp_path: Path) -> None:
    module_, batches = module(packing=packing), conversations()
    means = Trainer(**QUIET).validate(module_, loader(batches), verbose=False)[0]
    gaps: dict[str, list[float]] = {}
    for batch in batches:
        with torch.no_grad():
            q, p = (
                model.eval()(input_ids=batch["input_ids"]).logits.double().softmax(-1)
                for model in (module_.student.model, module_.teacher.model.model)
            )
        for row, place in (batch["turn"] >= 0).nonzero().tolist():
            p_, q_ = p[row, place - 1], q[row, place - 1]
            order = p_.argsort(descending=True)
            head = order[: int((p_[order].cumsum(0) < 0.5).sum()) + 1]
            number, gap = int(batch["turn"][row, place]) + 1, (p_ - q_).abs()
            gaps.setdefault(f"val/turn_{number}/head_error", []).append(gap[head].sum().item())
            gaps.setdefault(f"val/turn_{number}/tail_error", []).append((gap.sum() - gap[head].sum()).item())
    assert {name for name in means if "turn" in name} == set(gaps) and len(gaps) == 4
    for name, values in gaps.items():
        assert means[name] == pytest.approx(sum(values) / len(values), rel=1e-4)
    means = Trainer(**QUIET).test(module_, [loader(batches[:1]), loader(batches[1:])], verbose=False)
    assert {"test/turn_1/head_error", "test/1/turn_2/tail_error"} <= {name for of in means for name in of}
    # Of responses alone, and without a teacher, there is nothing to tell apart.
    plain = [{name: value for name, value in batch.items() if name != "turn"} for batch in batches]
    assert not any("turn" in name for name in Trainer(**QUIET).validate(module_, loader(plain), verbose=False)[0])


def test_a_run_that_goes_on_has_the_same_errors(tmp_path: Path) -> None:
    """From a checkpoint within an epoch, whose validation is still to come."""

    def run(steps: int, ckpt_path: Path | None = None) -> Trainer:
        trainer = Trainer(**QUIET, max_steps=steps, num_sanity_val_steps=0)
        trainer.fit(module(), loader(conversations(1) * 4), loader(conversations()), ckpt_path=ckpt_path)
        return trainer

    run(2).save_checkpoint(tmp_path / "two.ckpt")
    whole, resumed = run(4).callback_metrics, run(4, tmp_path / "two.ckpt").callback_metrics
    names = {name for name in whole if "turn" in name}
    assert len(names) == 4 and all(name.startswith("val/") for name in names)
    assert all(torch.equal(whole[name], resumed[name]) for name in names)


def test_turns_leave_out_tokens_that_are_not_aligned() -> None:
    errors, gaps = TurnErrors(), torch.tensor([0.5, torch.nan, 1.0])
    errors.update(gaps, gaps, torch.tensor([0, 1, 1]), torch.tensor([1.0, 0.0, 1.0]))
    assert errors.compute()["turn_2/head_error"] == 1
