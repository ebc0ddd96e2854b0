"""The weight of the divergence at each token, in place of one for all."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from akl_lightning.criterion import DistillationCriterion
from akl_lightning.divergences import (
    AdaptiveKL,
    Divergence,
    ForwardKL,
    JensenShannon,
    ReverseKL,
    SkewKL,
    TotalVariation,
    WeightedKL,
)
from akl_lightning.errors import UsageError
from akl_lightning.projection import Projection
from tests import references

TOKENS, VOCAB = 9, 40


class Own(Divergence):
    """A forward KL that the kernels know nothing of."""

    def compare(self, student: Tensor, teacher: Tensor) -> Tensor:
        return (teacher.exp() * (teacher - student)).sum(-1)


DIVERGENCES: dict[str, tuple[Divergence, str, float]] = {
    "AKL": (AdaptiveKL(), "adaptive_kl", 0.0),
    "FKL": (ForwardKL(), "forward_kl", 0.0),
    "RKL": (ReverseKL(), "reverse_kl", 0.0),
    "mix": (WeightedKL(0.3), "weighted_kl", 0.3),
    "JSD": (JensenShannon(0.4), "jensen_shannon", 0.4),
    "skewed": (SkewKL(0.2), "skew_forward_kl", 0.2),
    "skewed reverse": (SkewKL(0.2, reverse=True), "skew_reverse_kl", 0.2),
    "TVD": (TotalVariation(), "total_variation", 0.0),
    "a user's": (Own(), "forward_kl", 0.0),
}
each = pytest.mark.parametrize("name", DIVERGENCES)


def problem(extra: int = 0, apart: float = 2.0) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    teacher = 2 * torch.randn(TOKENS, VOCAB, dtype=torch.double)
    student = torch.cat([teacher, torch.zeros(TOKENS, extra, dtype=torch.double)], -1)
    student += apart * torch.randn(student.shape, dtype=torch.double)
    return student, teacher, torch.randint(0, VOCAB, (TOKENS,)), torch.rand(TOKENS, dtype=torch.double)


def run(
    criterion: DistillationCriterion, student: Tensor, teacher: Tensor | None, labels: Tensor, alpha: Tensor | None
) -> tuple[dict[str, Tensor], Tensor]:
    twin = student.detach().clone().requires_grad_()
    output = criterion(twin, teacher, labels, alpha)
    output.loss.backward()
    assert twin.grad is not None
    return {"sum": output.loss.detach(), **output.statistics}, twin.grad


@each
@pytest.mark.parametrize("t", [1.0, 1.7])
def test_values_and_gradients(name: str, t: float) -> None:
    divergence, pair, constant = DIVERGENCES[name]
    student, teacher, labels, alpha = problem()
    alpha[:2] = torch.tensor([0.0, 1.0])
    ours, gradient = run(DistillationCriterion(divergence, 0.9, t, chunk_size=4), student, teacher, labels, alpha)
    # A row's gradient is that of its divergence and that of its cross entropy, in the row's own shares.
    whole, of_divergence, _ = references.compare(student, teacher, labels, pair, constant, 1.0, t)
    _, of_labels, _ = references.compare(student, teacher, labels, pair, constant, 0.0, t)
    loss = alpha * whole["divergence"] + (1 - alpha) * whole["cross_entropy"]
    for statistic, expected in {**whole, "loss": loss, "sum": loss.sum()}.items():
        assert torch.allclose(ours[statistic], expected, rtol=1e-9, atol=1e-12), statistic
    right = alpha[:, None] * of_divergence + (1 - alpha)[:, None] * of_labels
    assert (gradient - right).norm() <= 1e-9 * right.norm()


@each
@pytest.mark.parametrize("extra", [0, 4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("alpha", [0.0, 0.3, 1.0])
def test_one_weight_for_all_is_the_criterions_bit_by_bit(
    name: str, extra: int, dtype: torch.dtype, alpha: float
) -> None:
    divergence = DIVERGENCES[name][0]
    for t, apart in ((1.0, 2.0), (1.7, 2.0), (1.0, 0.01)):  # the last so near that its gradient gets more passes
        student, teacher, labels, _ = problem(extra, apart)
        student, teacher = student.to(dtype), teacher.to(dtype)
        mine, given = DistillationCriterion(divergence, alpha, t), DistillationCriterion(divergence, 0.8, t)
        expected, right = run(mine, student, teacher, labels, None)
        ours, gradient = run(given, student, teacher, labels, torch.full((TOKENS,), alpha, dtype=torch.double))
        assert ours.keys() == expected.keys()
        assert all(torch.equal(ours[statistic], values) for statistic, values in expected.items())
        assert all(ours[statistic].dtype == values.dtype for statistic, values in expected.items())
        assert torch.equal(gradient, right)


@pytest.mark.parametrize("name", [name for name in DIVERGENCES if name != "AKL"])  # its weights are held
def test_gradcheck(name: str) -> None:
    student, teacher, labels, alpha = problem()
    criterion = DistillationCriterion(DIVERGENCES[name][0], 0.1)
    alpha[:2] = torch.tensor([0.0, 1.0])
    student.requires_grad_()
    assert torch.autograd.gradcheck(lambda x: criterion(x, teacher, labels, alpha).loss, student)


@each
@pytest.mark.parametrize("value", [-torch.inf, torch.nan])
def test_a_weight_of_zero_switches_its_part_off(name: str, value: float) -> None:
    criterion = DistillationCriterion(DIVERGENCES[name][0])
    student, teacher, labels, _ = problem()
    labels[:] = torch.arange(TOKENS)
    teacher[:3, 20:] = value  # with an infinite divergence, or none at all
    student[3:6] = student[3:6].index_fill(1, torch.arange(TOKENS), -torch.inf)  # with an infinite cross entropy
    alpha = torch.tensor([0.0, 0.0, 0.0, 1.0, 1.0, 1.0, 0.5, 0.5, 0.5], dtype=torch.double)
    ours, gradient = run(criterion, student, teacher, labels, alpha)
    assert gradient.isfinite().all()
    alone, of_labels = run(DistillationCriterion(alpha=0.0), student[:3], None, labels[:3], None)
    assert torch.allclose(ours["loss"][:3], alone["loss"]) and torch.allclose(gradient[:3], of_labels)
    assert torch.equal(ours["loss"][3:6], ours["divergence"][3:6])
    assert ours["cross_entropy"][3:6].isinf().all() and ours["loss"][6:].isfinite().all()


@pytest.mark.parametrize("kind", ["linear", "module"])
@pytest.mark.parametrize("extra", [0, 4])
def test_heads_chunk_by_chunk(kind: str, extra: int) -> None:
    linear, others = nn.Linear(8, VOCAB + extra).double(), nn.Linear(6, VOCAB).double()
    hidden, theirs = torch.randn(TOKENS, 8).double().requires_grad_(), torch.randn(TOKENS, 6).double()
    labels, alpha = torch.randint(0, VOCAB, (TOKENS,)), torch.rand(TOKENS)
    head: Any = nn.Sequential(linear) if kind == "module" else linear
    inputs = [hidden, linear.weight, linear.bias]
    found = []
    for chunk_size in (2, 100):
        criterion = DistillationCriterion(AdaptiveKL(), chunk_size=chunk_size)
        output = criterion(Projection(hidden, head), Projection(theirs, others), labels, alpha)
        found.append([output.statistics["loss"], *torch.autograd.grad(output.loss, inputs)])
    whole = DistillationCriterion(AdaptiveKL())(linear(hidden), others(theirs).detach(), labels, alpha)
    found.append([whole.statistics["loss"], *torch.autograd.grad(whole.loss, inputs)])
    for one, two, three in zip(*found, strict=True):
        assert torch.allclose(one, two, rtol=1e-9) and torch.allclose(one, three, rtol=1e-9)


def test_outputs_that_only_the_student_has() -> None:
    """Each row as with a criterion of its weight."""
    student, teacher, labels, alpha = problem(extra=4)
    alpha[:2] = torch.tensor([0.0, 1.0])
    ours, gradient = run(DistillationCriterion(), student, teacher, labels, alpha)
    for row, own in enumerate(alpha.tolist()):
        one = slice(row, row + 1)
        expected, right = run(DistillationCriterion(alpha=own), student[one], teacher[one], labels[one], None)
        assert torch.allclose(ours["loss"][one], expected["loss"], rtol=1e-12)
        assert torch.allclose(gradient[one], right, rtol=1e-9, atol=1e-15)


def test_without_a_teacher() -> None:
    student, _, labels, alpha = problem()
    ours, gradient = run(DistillationCriterion(alpha=1.0), student, None, labels, alpha)
    twin = student.clone().requires_grad_()
    cross_entropy = nn.functional.cross_entropy(twin, labels, reduction="none")
    loss = (1 - alpha) * cross_entropy
    loss.sum().backward()
    assert torch.allclose(ours["loss"], loss.detach()) and torch.allclose(ours["cross_entropy"], cross_entropy.detach())
    assert torch.allclose(gradient, twin.grad)
    alpha[3] = 1.0
    with pytest.raises(UsageError, match=r"alpha must lie in \[0, 1\], and below 1 without a teacher, got 1.0 at"):
        run(DistillationCriterion(alpha=0.0), student, None, labels, alpha)


@pytest.mark.parametrize("wrong", [-0.1, 1.1, torch.nan])
def test_what_is_no_weight_is_refused(wrong: float) -> None:
    student, teacher, labels, alpha = problem()
    alpha[1] = wrong
    with pytest.raises(UsageError, match=r"alpha must lie in \[0, 1\], got "):
        run(DistillationCriterion(), student, teacher, labels, alpha)
    for other in (alpha[:3], alpha[:, None], torch.ones(TOKENS, dtype=torch.long)):
        with pytest.raises(UsageError, match=r"alpha \[.*\] of torch.* with labels \[9\]: give one float a token"):
            run(DistillationCriterion(), student, teacher, labels, other)


def test_no_tokens() -> None:
    none = torch.zeros(0, VOCAB, requires_grad=True)
    output = DistillationCriterion()(none, torch.zeros(0, VOCAB), torch.zeros(0, dtype=torch.long), torch.zeros(0))
    output.loss.backward()
    assert output.loss == 0
