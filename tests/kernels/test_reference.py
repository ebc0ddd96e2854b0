"""The comparison of a chunk against autograd of the plain functions in float64."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from akl_lightning import functional as F
from akl_lightning.kernels import compare, reference
from akl_lightning.kernels.pairs import PAIRS, Comparison

INF = float("inf")
ROWS, VOCAB = 12, 211

DIVERGENCES: dict[tuple[str, float], Callable[..., Tensor]] = {
    ("forward_kl", 0.0): F.forward_kl,
    ("reverse_kl", 0.0): F.reverse_kl,
    ("weighted_kl", 0.0): lambda s, t, **k: F.weighted_kl(s, t, 0.0, **k),
    ("weighted_kl", 0.3): lambda s, t, **k: F.weighted_kl(s, t, 0.3, **k),
    ("adaptive_kl", 0.0): F.adaptive_kl,
    **{
        ("jensen_shannon", beta): lambda s, t, b=beta, **k: F.jensen_shannon(s, t, b, **k)
        for beta in (0.001, 0.3, 0.999)
    },
    **{
        ("skew_forward_kl", skew): lambda s, t, w=skew, **k: F.skew_forward_kl(s, t, w, **k)
        for skew in (0.0, 1e-4, 0.1, 0.9, 1.0)
    },
    **{
        ("skew_reverse_kl", skew): lambda s, t, w=skew, **k: F.skew_reverse_kl(s, t, w, **k)
        for skew in (0.0, 1e-4, 0.1, 0.9, 1.0)
    },
    ("total_variation", 0.0): F.total_variation,
}  # fmt: skip
ALL = pytest.mark.parametrize(("pair", "constant"), DIVERGENCES)


def logits(scale: float = 2.0, distance: float = 1.0) -> tuple[Tensor, Tensor, Tensor]:
    teacher = scale * torch.randn(ROWS, VOCAB) + 3 * torch.randn(ROWS, 1)
    return teacher + distance * torch.randn(ROWS, VOCAB), teacher, torch.randint(0, VOCAB, (ROWS,))


def run(student: Tensor, teacher: Tensor | None, labels: Tensor, how: Comparison) -> tuple[dict[str, Tensor], Tensor]:
    gradient = torch.full_like(student, torch.nan)
    teacher = None if teacher is None else teacher.clone()
    return compare(student.clone(), teacher, labels, how, gradient), gradient


def expected(student: Tensor, teacher: Tensor, labels: Tensor, how: Comparison) -> tuple[dict[str, Tensor], Tensor]:
    """Statistics and gradient in float64, by autograd of the dense functions."""
    s, t = student.double().requires_grad_(), teacher.double()
    ours = DIVERGENCES[str(how.pair), how.constant]
    options = {"mu": how.mu, "head_rule": how.head_rule} if how.pair == "adaptive_kl" else {}
    divergence = ours(s, t, temperature=how.temperature, **options)
    cross_entropy = -F.log_probs(s).gather(-1, labels[:, None]).squeeze(-1)
    loss = F.weighted(how.alpha, divergence) + F.weighted(1 - how.alpha, cross_entropy)
    if loss.requires_grad:
        (gradient,) = torch.autograd.grad(loss.sum(), s)
    else:  # a skewed KL that is 0 whatever the student says
        gradient = torch.zeros_like(s)
    log_q, log_p = F.log_probs(s.detach(), how.temperature), F.log_probs(t, how.temperature)
    head_gap, tail_gap = F.head_tail_gap(log_q.exp(), log_p.exp(), how.mu, how.head_rule)
    return {
        "loss": loss, "divergence": divergence, "cross_entropy": cross_entropy,
        "fkl": F.forward_kl_from_log_probs(log_q, log_p), "rkl": F.reverse_kl_from_log_probs(log_q, log_p),
        "head_gap": head_gap, "tail_gap": tail_gap, "head_weight": F.head_weight(head_gap, tail_gap),
        "top1_agreement": (log_q.argmax(-1) == log_p.argmax(-1)).double(),
    }, gradient  # fmt: skip


def check(
    student: Tensor, teacher: Tensor, labels: Tensor, how: Comparison, rtol: float = 1e-5, atol: float = 0.0
) -> None:
    statistics, gradient = run(student, teacher, labels, how)
    dense, dense_gradient = expected(student, teacher, labels, how)
    assert list(statistics) == list(dense)
    for name, values in dense.items():
        assert statistics[name].dtype == student.dtype
        values = values.detach()
        finite = values.isfinite()
        assert torch.equal(statistics[name].double()[~finite], values[~finite]), name
        error = (statistics[name].double() - values)[finite].abs()
        if name == "head_weight":  # a quotient of gaps, which may be small
            error = error * (dense["head_gap"] + dense["tail_gap"])[finite].clamp(max=1)
        assert (error <= rtol * values[finite].abs() + 0.1 * rtol).all(), name
    assert (gradient.double() - dense_gradient).norm() <= rtol * dense_gradient.norm() + atol


@ALL
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("temperature", [1.0, 1.7])
def test_every_divergence(pair: str, constant: float, dtype: torch.dtype, temperature: float) -> None:
    student, teacher, labels = logits()
    how = Comparison(pair, constant, 0.7, temperature, 0.6)
    check(student.to(dtype), teacher.to(dtype), labels, how, 1e-5 if dtype == torch.float32 else 1e-10)


@ALL
def test_masked_tokens(pair: str, constant: float) -> None:
    student, teacher, labels = (x.double() if x.is_floating_point() else x for x in logits())
    student[0, 7] = teacher[0, 7] = -INF
    student[1, 7] = -INF
    teacher[2, 7] = -INF
    student[3, 5] = teacher[3, 5] = torch.finfo(torch.bfloat16).min
    student[4, 5] = torch.finfo(torch.float32).min
    teacher[5, 5], teacher[5, 6], student[5, 6] = -3.39e38, -INF, -3.39e38
    student[6, labels[6]] = -INF  # cross entropy is infinite
    for alpha, temperature in ((1.0, 1.0), (0.4, 2.0), (0.0, 1.0)):
        how = Comparison(pair, constant, alpha, temperature)
        check(student, teacher, labels, how, 1e-9)
        statistics, gradient = run(student, teacher, labels, how)
        assert gradient.isfinite().all()
        assert statistics["fkl"].isinf().nonzero().flatten().tolist() == [1, 4, 6]
        assert statistics["rkl"].isinf().nonzero().flatten().tolist() == [2, 5]


@pytest.mark.parametrize(("pair", "constant"), [key for key in DIVERGENCES if key[0] != "total_variation"])
@pytest.mark.parametrize("scale", [0.5, 2.0, 4.0])
def test_a_student_very_near_its_teacher(pair: str, constant: float, scale: float) -> None:
    """A forward KL of 1e-4, in float32, with logits that are far from 0. (Total variation has no slope at equality.)"""
    teacher = scale * torch.randn(ROWS, 4001) - 40
    student, labels = teacher + 0.014 * torch.randn(ROWS, 4001), torch.randint(0, 4001, (ROWS,))
    check(student, teacher, labels, Comparison(pair, constant, 1.0), atol=1e-12)  # of a skewed KL, nothing may be left


@pytest.mark.parametrize("offset", [-300.0, 2048.0])
def test_one_side_may_be_far_from_the_other(offset: float) -> None:
    student, teacher, labels = logits()
    check(student + offset, teacher, labels, Comparison("adaptive_kl"))


@ALL
def test_distributions_that_have_nothing_in_common(pair: str, constant: float) -> None:
    student, teacher, labels = logits(scale=1.0)
    student[:, :100] += 120  # beyond what float32 has exponents for, and with few digits left behind the point
    teacher[:, 100:] += 120
    check(student, teacher, labels, Comparison(pair, constant, 1.0), rtol=3e-5, atol=1e-6)


@pytest.mark.parametrize("mu", [0.02, 0.5, 0.97, 1.0])
@pytest.mark.parametrize("rule", ["cover", "within"])
@pytest.mark.parametrize("vocab", [5, 211, 9001])
def test_heads_with_and_without_ties(mu: float, rule: Any, vocab: int) -> None:
    for kind in ("plain", "ties", "flat"):
        teacher = 2 * torch.randn(ROWS, vocab, dtype=torch.float64)
        teacher = {"plain": teacher, "ties": teacher.round(), "flat": torch.zeros_like(teacher)}[kind]
        student, labels = torch.randn(ROWS, vocab, dtype=torch.float64), torch.zeros(ROWS, dtype=torch.long)
        how = Comparison("adaptive_kl", 0.0, 1.0, 1.0, mu, rule)
        if kind == "plain":
            check(student, teacher, labels, how, 1e-9)
        dense, gradient = expected(student, teacher, labels, how)
        statistics, ours = run(student, teacher, labels, how)
        for name in ("head_gap", "tail_gap", "divergence"):
            assert torch.allclose(statistics[name], dense[name], rtol=1e-9), (kind, name)
        assert torch.allclose(ours, gradient, atol=1e-12)
        order = torch.randperm(vocab)
        permuted = run(student[:, order], teacher[:, order], labels, Comparison(None, mu=mu, head_rule=rule))[0]
        plain = run(student, teacher, labels, Comparison(None, mu=mu, head_rule=rule))[0]
        for name in ("head_gap", "tail_gap"):
            assert torch.allclose(permuted[name], plain[name], atol=1e-12), (kind, name)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("pair", ["adaptive_kl", "jensen_shannon", None])
@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_where_the_gradient_goes(dtype: torch.dtype, pair: str | None, temperature: float) -> None:
    student, teacher, labels = logits()
    how = Comparison(pair, 0.5, 0.5, temperature)
    statistics, gradient = run(student, teacher, labels, how)
    lower = torch.empty(ROWS, VOCAB + 3, dtype=dtype)[:, :VOCAB]  # a stride of its own, and another precision
    for into in (student.clone(), lower):
        logits_ = into if into.dtype == torch.float32 and into is not lower else student.clone()
        again = compare(logits_, teacher.clone(), labels, how, into)
        assert torch.equal(into, gradient.to(into.dtype))
        assert all(torch.equal(again[name], values) for name, values in statistics.items())
    without = compare(student.clone(), teacher.clone(), labels, how)
    assert all(torch.equal(without[name], values) for name, values in statistics.items())


def test_no_divergence_of_ours_leaves_cross_entropy_alone() -> None:
    student, teacher, labels = logits()
    statistics, gradient = run(student, teacher, labels, Comparison(None, alpha=0.3))
    whole = student.clone().requires_grad_()
    loss = 0.7 * torch.nn.functional.cross_entropy(whole, labels, reduction="none")
    loss.sum().backward()
    assert not statistics["divergence"].any() and torch.allclose(statistics["loss"], loss, atol=1e-6)
    assert torch.allclose(gradient, whole.grad, atol=1e-6)


def test_blocks_of_rows_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    student, teacher, labels = logits()
    how = Comparison("adaptive_kl", 0.0, 0.6)
    whole, gradient = run(student, teacher, labels, how)
    monkeypatch.setattr(reference, "_CACHE_BYTES", 5 * 4 * VOCAB)
    assert reference.rows_at_a_time(student) == 5
    pieces, in_pieces = run(student, teacher, labels, how)
    assert torch.equal(gradient, in_pieces) and all(torch.equal(whole[name], pieces[name]) for name in whole)


def test_no_rows() -> None:
    empty, labels = torch.empty(0, VOCAB), torch.empty(0, dtype=torch.long)
    for pair in (*PAIRS, None):
        statistics, _ = run(empty, empty, labels, Comparison(pair, 0.5))
        assert len(statistics) == 9 and all(values.shape == (0,) for values in statistics.values())
    assert set(run(empty, None, labels, Comparison(None))[0]) == {"loss", "cross_entropy"}


@pytest.mark.parametrize("bad", [torch.nan, INF])
def test_nan_and_infinite_logits_are_never_hidden(bad: float) -> None:
    for side in (0, 1):
        for pair in PAIRS:
            both = list(logits())
            both[side][1, 3] = bad
            statistics, _ = run(*both, Comparison(pair, 0.5))  # type: ignore[arg-type]
            for name in ("loss", "divergence", "fkl", "rkl", "head_gap", "head_weight"):
                assert statistics[name].isnan().nonzero().flatten().tolist() == [1], (name, pair, side)


class Allocated(TorchDispatchMode):
    """The most elements that any new tensor had."""

    def __init__(self) -> None:
        super().__init__()
        self.known: set[int] = set()
        self.elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, tuple | list) else (result,):
            if isinstance(tensor, Tensor) and tensor.untyped_storage().data_ptr() not in self.known:
                self.elements = max(self.elements, tensor.numel())
        return result


def test_without_a_teacher_nothing_of_the_logits_size_is_taken() -> None:
    student, teacher, labels = logits()
    with Allocated() as watch:
        watch.known = {student.untyped_storage().data_ptr()}
        cross_entropy = compare(student, None, labels, Comparison(None, alpha=0.0), student)["cross_entropy"]
    assert cross_entropy.shape == (ROWS,) and watch.elements <= ROWS
    student, teacher, labels = logits()
    with Allocated() as watch:
        compare(student, teacher, labels, Comparison("forward_kl"), student)
    assert watch.elements >= ROWS * VOCAB, "the watch would notice"


def test_supervised_fine_tuning() -> None:
    student, _, labels = logits()
    student[0, 3] = torch.finfo(torch.float32).min
    student[1, labels[1]] = torch.finfo(torch.float32).min
    statistics, gradient = run(student, None, labels, Comparison("adaptive_kl", alpha=0.0))
    whole = student.double().requires_grad_()
    loss = torch.nn.functional.cross_entropy(whole, labels, reduction="none")
    loss.sum().backward()
    assert statistics["loss"][1].isinf()
    assert torch.allclose(statistics["loss"].double()[2:], loss[2:], atol=1e-6)
    assert (gradient - whole.grad).norm() <= 1e-5 * whole.grad.norm()
