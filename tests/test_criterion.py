import pytest
import torch

from akl_lightning import functional as F
from akl_lightning.criterion import STATISTICS, DistillationCriterion
from akl_lightning.divergences import (
    AdaptiveKL,
    Divergence,
    ForwardKL,
    JensenShannon,
    ReverseKL,
    SkewKL,
    TotalVariation,
    WeightedKL,
    known_divergences,
)
from akl_lightning.errors import UsageError

STUDENT, TEACHER = torch.randn(2, 8, 40, generator=torch.Generator().manual_seed(1), dtype=torch.float64).mul(2)
LABELS = torch.arange(8)


@pytest.mark.parametrize(
    ("module", "function", "options"),
    [
        (AdaptiveKL(0.7, "within"), F.adaptive_kl, {"mu": 0.7, "head_rule": "within"}),
        (ForwardKL(), F.forward_kl, {}),
        (ReverseKL(), F.reverse_kl, {}),
        (WeightedKL(0.2), F.weighted_kl, {"forward_weight": 0.2}),
        (JensenShannon(0.3), F.jensen_shannon, {"beta": 0.3}),
        (SkewKL(0.2), F.skew_forward_kl, {"skew": 0.2}),
        (SkewKL(0.2, reverse=True), F.skew_reverse_kl, {"skew": 0.2}),
        (TotalVariation(), F.total_variation, {}),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, Divergence) else "",
)
def test_modules_are_the_functions(module: Divergence, function, options: dict) -> None:
    expected = function(STUDENT, TEACHER, temperature=1.5, **options)
    assert torch.allclose(module(STUDENT, TEACHER, 1.5), expected)
    output = DistillationCriterion(module, alpha=1.0, temperature=1.5)(STUDENT, TEACHER, LABELS)
    assert torch.allclose(output.loss, expected.sum())
    assert torch.allclose(output.statistics["divergence"], expected)


def test_the_loss_is_the_weighted_sum_over_tokens() -> None:
    output = DistillationCriterion(alpha=0.3)(STUDENT, TEACHER, LABELS)
    cross_entropy = torch.nn.functional.cross_entropy(STUDENT, LABELS, reduction="none")
    per_token = 0.3 * F.adaptive_kl(STUDENT, TEACHER) + 0.7 * cross_entropy
    assert torch.allclose(output.loss, per_token.sum())
    assert tuple(sorted(output.statistics)) == tuple(sorted(STATISTICS))
    head_gap, tail_gap = F.head_tail_gap(STUDENT.softmax(-1), TEACHER.softmax(-1))
    expected = {
        "loss": per_token,
        "cross_entropy": cross_entropy,
        "fkl": F.forward_kl(STUDENT, TEACHER),
        "rkl": F.reverse_kl(STUDENT, TEACHER),
        "head_gap": head_gap,
        "tail_gap": tail_gap,
        "head_weight": head_gap / (head_gap + tail_gap),
        "top1_agreement": (STUDENT.argmax(-1) == TEACHER.argmax(-1)).double(),
    }
    for name, values in expected.items():
        assert torch.allclose(output.statistics[name], values), name


def test_without_a_teacher_it_is_supervised_fine_tuning() -> None:
    output = DistillationCriterion(alpha=0.0)(STUDENT, None, LABELS)
    assert torch.allclose(output.loss, torch.nn.functional.cross_entropy(STUDENT, LABELS, reduction="sum"))
    assert set(output.statistics) == {"loss", "cross_entropy"}
    with pytest.raises(UsageError, match=r"alpha = 0.5 needs a teacher"):
        DistillationCriterion()(STUDENT, None, LABELS)


def test_a_batch_without_response_tokens_adds_nothing() -> None:
    logits = torch.zeros(0, 40, requires_grad=True)
    output = DistillationCriterion()(logits, torch.zeros(0, 40), torch.zeros(0, dtype=torch.long))
    output.loss.backward()
    assert output.loss == 0
    assert all(values.numel() == 0 for values in output.statistics.values())


def test_response_positions_predict_the_labels() -> None:
    batch = torch.tensor([[-100, -100, 5, 6], [7, -100, -100, 8]])
    positions, labels = DistillationCriterion().response_positions(batch)
    assert positions.dtype == torch.int64 and positions.tolist() == [1, 2, 6]
    assert labels.tolist() == [5, 6, 8]


def test_logits_of_whole_sequences_are_refused() -> None:
    dense, labels = torch.zeros(2, 3, 7), torch.zeros(2, 3, dtype=torch.long)
    with pytest.raises(UsageError, match=r"student logits \[2, 3, 7\] with labels \[2, 3\]: pass logits"):
        DistillationCriterion()(dense, dense, labels)
    with pytest.raises(UsageError, match=r"teacher logits .* pass logits \[tokens, vocab\]"):
        DistillationCriterion()(dense.flatten(0, 1), dense, labels.flatten())


def test_a_subclass_with_a_value_of_its_own_is_not_taken_for_its_parent() -> None:
    class Doubled(ForwardKL):
        def compare(self, student, teacher):
            return 2 * super().compare(student, teacher)

    class Renamed(WeightedKL):
        def __init__(self) -> None:
            super().__init__(0.9)

    assert Doubled().pair is None and Renamed().pair == "weighted_kl" and Renamed().constant == 0.9
    student = STUDENT.clone().requires_grad_()
    output = DistillationCriterion(Doubled(), alpha=1.0)(student, TEACHER, LABELS)
    output.loss.backward()
    assert torch.allclose(output.statistics["divergence"], 2 * F.forward_kl(STUDENT, TEACHER))
    assert torch.allclose(student.grad, 2 * (STUDENT.softmax(-1) - TEACHER.softmax(-1)))
    assert {"Doubled", "Renamed"} <= set(known_divergences())


def test_a_weight_of_zero_switches_its_part_off() -> None:
    masked = STUDENT.clone()
    masked[:, 0] = -torch.inf
    output = DistillationCriterion(alpha=1.0)(masked, masked, LABELS)  # label 0 has no mass: its cross entropy is inf
    assert output.loss == 0


def test_bad_arguments() -> None:
    with pytest.raises(UsageError, match=r"unknown divergence 'AKL': use one of AdaptiveKL, .*ForwardKL") as caught:
        DistillationCriterion("AKL")  # type: ignore[arg-type]
    assert "Lazy" not in str(caught.value)
    with pytest.raises(UsageError, match=r"alpha must lie in \[0, 1\]"):
        DistillationCriterion(alpha=1.5)
    with pytest.raises(UsageError, match="temperature must be a positive number"):
        DistillationCriterion(temperature=0)
    with pytest.raises(UsageError, match="mu must lie"):
        AdaptiveKL(mu=0)


def test_known_divergences_count_a_users_own() -> None:
    class Mine(Divergence):
        def compare(self, student, teacher):
            return (student - teacher).square().sum(-1)

    assert {"Mine", "AdaptiveKL", "SkewKL"} <= set(known_divergences())
    assert "Divergence" not in known_divergences()


@pytest.mark.parametrize(
    "divergence", [AdaptiveKL, ForwardKL, ReverseKL, WeightedKL, JensenShannon, SkewKL, TotalVariation]
)
def test_nan_on_either_side_is_never_hidden(divergence: type[Divergence]) -> None:
    for side in (0, 1):
        logits = [torch.randn(3, 7), torch.randn(3, 7)]
        logits[side][1] = torch.nan
        output = DistillationCriterion(divergence())(*logits, torch.tensor([1, 2, 3]))
        assert output.statistics["divergence"].isnan().tolist() == [False, True, False]
        assert output.loss.isnan()
