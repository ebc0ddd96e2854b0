import pytest
import torch

from akl_lightning.criterion import DistillationCriterion
from akl_lightning.metrics import HeadTailError, TokenMean, distillation_metrics


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
