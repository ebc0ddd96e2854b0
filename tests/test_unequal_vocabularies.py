"""A student with more outputs than the teacher learns to avoid them; everything else compares what both have."""

import re
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from lightning.pytorch import LightningDataModule, Trainer
from torch import Tensor, nn
from torch.utils.data import DataLoader

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
from akl_lightning.module import DistillationModule
from akl_lightning.projection import Projection
from tests.conftest import QUIET, gpt2, write
from tests.test_module import loader, samples, stack

COMMON, EXTRA, TOKENS = 30, 4, 11
SAID = re.compile(r"outputs", re.I)
"""What the sentence about outputs that only the student has surely holds, said once where alpha is 1."""

Formula = Any


def fkl(p: Tensor, q: Tensor) -> Tensor:
    return (p * (p / q).log()).sum(-1)


def akl(p: Tensor, q: Tensor) -> Tensor:
    weights = []
    for row, other in zip(p, q, strict=True):
        order = row.argsort(descending=True)
        head = order[: int((row[order].cumsum(0) < 0.5).sum()) + 1]
        gap = (row - other).abs()
        weights.append(gap[head].sum() / gap.sum())
    weight = torch.stack(weights).detach()
    return weight * fkl(p, q) + (1 - weight) * fkl(q, p)


def jsd(p: Tensor, q: Tensor) -> Tensor:
    middle = 0.4 * p + 0.6 * q
    return 0.4 * fkl(p, middle) + 0.6 * fkl(q, middle)


DIVERGENCES: dict[str, tuple[Divergence, Formula]] = {
    "AKL": (AdaptiveKL(), akl),
    "FKL": (ForwardKL(), fkl),
    "RKL": (ReverseKL(), lambda p, q: fkl(q, p)),
    "mix": (WeightedKL(0.3), lambda p, q: 0.3 * fkl(p, q) + 0.7 * fkl(q, p)),
    "JSD": (JensenShannon(0.4), jsd),
    "skewed": (SkewKL(0.2), lambda p, q: fkl(p, 0.2 * p + 0.8 * q)),
    "TVD": (TotalVariation(), lambda p, q: 0.5 * (p - q).abs().sum(-1)),
}


def by_hand(
    student: Tensor, teacher: Tensor, labels: Tensor, formula: Formula, alpha: float, t: float = 1.0
) -> dict[str, Tensor]:
    """Per token: cross entropy over all outputs of the student, the divergence over the common ones."""
    common = min(student.shape[-1], teacher.shape[-1])
    p, q = ((logits[:, :common] / t).softmax(-1) for logits in (teacher, student))
    divergence = t**2 * formula(p, q)
    whole = student.log_softmax(-1)
    cross_entropy = -whole.gather(-1, labels[:, None])[:, 0]
    loss = alpha * divergence + (1 - alpha) * cross_entropy
    if alpha == 1 and student.shape[-1] > common:
        loss = loss - whole[:, :common].logsumexp(-1)
    return {"loss": loss, "divergence": divergence, "cross_entropy": cross_entropy, "fkl": fkl(p, q), "rkl": fkl(q, p)}


def problem(extra: int = EXTRA, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    student = 2 * torch.randn(TOKENS, COMMON + max(extra, 0), generator=generator, dtype=torch.float64)
    teacher = 2 * torch.randn(TOKENS, COMMON + max(-extra, 0), generator=generator, dtype=torch.float64)
    return student, teacher, torch.randint(0, COMMON, (TOKENS,), generator=generator)


@pytest.mark.parametrize("alpha", [0.5, 0.9, 1.0])
@pytest.mark.parametrize("t", [1.0, 2.0])
@pytest.mark.parametrize("name", DIVERGENCES)
def test_values_and_gradients(name: str, t: float, alpha: float) -> None:
    divergence, formula = DIVERGENCES[name]
    student, teacher, labels = problem()
    twin = student.clone().requires_grad_()
    expected = by_hand(twin, teacher, labels, formula, alpha, t)
    (gradient,) = torch.autograd.grad(expected["loss"].sum(), twin)

    student.requires_grad_()
    output = DistillationCriterion(divergence, alpha, temperature=t, chunk_size=4)(student, teacher, labels)
    output.loss.backward()
    for statistic in ("loss", "divergence", "cross_entropy"):
        assert torch.allclose(output.statistics[statistic], expected[statistic].detach(), rtol=1e-9), statistic
    assert (student.grad - gradient).norm() <= 1e-9 * gradient.norm()
    assert student.grad[:, COMMON:].min() > 0, "a step moves mass off the outputs that only the student has"


@settings(max_examples=25, deadline=None)
@given(st.integers(-6, 6), st.sampled_from(sorted(DIVERGENCES)), st.sampled_from([0.0, 0.3, 1.0]), st.integers(0, 99))
def test_any_widths(extra: int, name: str, alpha: float, seed: int) -> None:
    divergence, formula = DIVERGENCES[name]
    student, teacher, labels = problem(extra, seed)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        output = DistillationCriterion(divergence, alpha)(student, teacher, labels)
    expected = by_hand(student, teacher, labels, formula, alpha)
    for statistic, values in expected.items():
        assert torch.allclose(output.statistics[statistic], values, rtol=1e-8, atol=1e-10), statistic


@pytest.mark.parametrize("kind", ["linear", "module", "capped"])
@pytest.mark.parametrize("alpha", [0.5, 1.0])
def test_heads_get_the_gradient_of_the_extra_rows(kind: str, alpha: float) -> None:
    torch.manual_seed(3)
    student, teacher = nn.Linear(8, COMMON + EXTRA).double(), nn.Linear(6, COMMON).double()
    hidden, others = torch.randn(TOKENS, 8).double().requires_grad_(), torch.randn(TOKENS, 6).double()
    labels = torch.randint(0, COMMON, (TOKENS,))
    cap = 1.5 if kind == "capped" else None
    head = nn.Sequential(student) if kind == "module" else student
    logits = student(hidden)
    logits = logits if cap is None else cap * torch.tanh(logits / cap)
    loss = by_hand(logits, teacher(others).detach(), labels, akl, alpha)["loss"].sum()
    inputs = [hidden, student.weight, student.bias]
    expected = torch.autograd.grad(loss, inputs)
    criterion = DistillationCriterion(AdaptiveKL(), alpha, chunk_size=3)
    output = criterion(Projection(hidden, head, cap), Projection(others, teacher), labels)
    assert output.loss.item() == pytest.approx(loss.item(), rel=1e-9)
    for one, other in zip(torch.autograd.grad(output.loss, inputs), expected, strict=True):
        assert (one - other).norm() <= 1e-9 * other.norm()
    assert expected[1][COMMON:].abs().max() > 0


def test_the_metrics_are_those_of_the_common_outputs() -> None:
    """As if the student had no others, whatever it gives them."""
    student, teacher, labels = problem()
    narrow = DistillationCriterion(alpha=1.0)(student[:, :COMMON], teacher, labels).statistics
    student[:, COMMON:] = 40.0  # the likeliest by far
    wide = DistillationCriterion(alpha=0.5)(student, teacher, labels).statistics
    for name in ("divergence", "fkl", "rkl", "head_gap", "tail_gap", "head_weight", "top1_agreement"):
        assert torch.allclose(wide[name], narrow[name], rtol=1e-9), name
        assert wide[name].isfinite().all()
    assert (wide["cross_entropy"] > 30).all()


def test_an_output_that_only_the_teacher_has_changes_nothing() -> None:
    student, teacher, labels = problem(extra=-EXTRA)
    one, two = (
        DistillationCriterion(alpha=alpha)(student, logits, labels).statistics
        for alpha, logits in ((1.0, teacher), (1.0, teacher[:, :COMMON]))
    )
    assert all(torch.allclose(one[name], two[name], rtol=1e-9) for name in one)


def test_masked_outputs_among_those_of_the_student() -> None:
    """Padding that the student itself masks costs nothing and gives no NaN."""
    student, teacher, labels = problem()
    masked = torch.cat([student[:, :COMMON], torch.full((TOKENS, EXTRA), -torch.inf, dtype=torch.float64)], -1)
    masked.requires_grad_()
    output = DistillationCriterion(alpha=1.0)(masked, teacher, labels)
    plain = DistillationCriterion(alpha=1.0)(student[:, :COMMON], teacher, labels)
    output.loss.backward()
    assert torch.allclose(output.loss, plain.loss, rtol=1e-9)
    assert masked.grad.isfinite().all() and masked.grad[:, COMMON:].abs().max() == 0


# --------------------------------------------------------------------------------------------------------------------
# Under the module


def wide() -> nn.Module:
    torch.manual_seed(5)
    return gpt2(16, vocab_size=320)


@pytest.mark.parametrize("alpha", [0.0, 0.5, 1.0])
def test_what_a_batch_costs(alpha: float) -> None:
    student, teacher = wide().double().eval(), gpt2(24).double().eval()
    module = DistillationModule(student, teacher, DistillationCriterion(alpha=alpha)).eval()
    batch = stack(samples())
    positions, labels = module.criterion.response_positions(batch["labels"])
    given = {name: batch[name] for name in ("input_ids", "attention_mask")}
    q, p = (model(**given).logits.flatten(0, 1)[positions] for model in (student, teacher))
    expected = by_hand(q, p.detach(), labels, akl, alpha)
    weights = student.lm_head.weight
    (gradient,) = torch.autograd.grad(expected["loss"].sum(), weights)
    output = module.distill(batch)
    output.loss.backward()
    assert output.loss.item() == pytest.approx(expected["loss"].sum().item(), rel=1e-9)
    assert (weights.grad - gradient).norm() <= 1e-9 * gradient.norm()
    # With and without a teacher, cross entropy is over the same outputs.
    alone = DistillationModule(student, None, DistillationCriterion(alpha=0.0)).eval().distill(batch)
    assert torch.allclose(alone.statistics["cross_entropy"], output.statistics["cross_entropy"], rtol=1e-9)


def extra_mass(student: nn.Module) -> float:
    batch = stack(samples())
    logits = student(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    return logits.softmax(-1)[..., 300:].sum(-1).mean().item()


@pytest.mark.parametrize("alpha", [0.5, 1.0])
@pytest.mark.parametrize("cached", [False, True])
def test_its_mass_leaves_them(alpha: float, cached: bool, data: Any, tokenizer: Any, tmp_path: Path) -> None:
    student, teacher = wide(), gpt2(24)
    source = write(teacher, tmp_path / "cache", data) if cached else teacher
    module = DistillationModule(
        student, source, DistillationCriterion(alpha=alpha), lambda weights: torch.optim.AdamW(weights, 1e-2)
    )
    before = extra_mass(student)
    Trainer(**QUIET, max_epochs=4).fit(module, data)
    assert before > 0.05 and extra_mass(student.eval()) < 0.5 * before


def test_a_cache_of_the_likeliest_tokens(data: Any, tmp_path: Path) -> None:
    """The rest is one bucket of the common outputs; the student's own are none of it."""
    student = wide()
    cached = write(gpt2(24), tmp_path / "cache", data, top_k=8)
    criterion = DistillationCriterion(ForwardKL(), alpha=1.0)
    batch = next(iter(data.samples("train", 4)))
    narrow = gpt2(16)
    weights = student.state_dict()
    for name in ("transformer.wte.weight", "lm_head.weight"):
        weights[name] = weights[name][:300]
    narrow.load_state_dict(weights)
    one, two = (DistillationModule(model, cached, criterion).eval().distill(batch) for model in (student, narrow))
    assert torch.allclose(one.statistics["fkl"], two.statistics["fkl"], rtol=1e-5)
    assert (one.statistics["loss"] > two.statistics["loss"]).all()


def test_it_is_said_once_where_alpha_is_1(data: Any) -> None:
    def said(student: nn.Module, alpha: float) -> int:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            module = DistillationModule(student, gpt2(24), DistillationCriterion(alpha=alpha))
            Trainer(**QUIET, max_epochs=2).fit(module, data)
        return sum(bool(SAID.search(str(warning.message))) for warning in caught)

    assert said(wide(), 1.0) == 1
    assert said(wide(), 0.5) == 0 and said(gpt2(16), 1.0) == 0


class Given(LightningDataModule):
    """Batches made by hand, and a tokenizer that tells that the outputs beyond it are padding."""

    def __init__(self, tokenizer: Any, batches: list[dict[str, Tensor]]) -> None:
        super().__init__()
        self.tokenizer, self.batches = tokenizer, batches

    def train_dataloader(self) -> DataLoader:
        return loader(self.batches)


def test_an_update_is_the_same_however_its_samples_are_split(tokenizer: Any) -> None:
    teacher = gpt2(24)

    def trained(batches: list[dict[str, Tensor]], **more: Any) -> Tensor:
        criterion = DistillationCriterion(alpha=1.0)
        module = DistillationModule(wide(), teacher, criterion, lambda weights: torch.optim.SGD(weights, 0.5))
        Trainer(**QUIET, max_epochs=2, **more).fit(module, Given(tokenizer, batches))
        return nn.utils.parameters_to_vector(module.parameters()).detach().double()

    whole = trained([stack(samples())])
    split = trained([stack(samples()[:3]), stack(samples()[3:])], accumulate_grad_batches=2)
    assert (whole - split).norm() <= 1e-5 * whole.norm()
