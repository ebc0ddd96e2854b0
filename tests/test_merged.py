"""A teacher over another vocabulary: classes of outputs are compared, against dense float64 with autograd."""

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from akl_lightning import sides
from akl_lightning.criterion import DistillationCriterion
from akl_lightning.divergences import AdaptiveKL, Divergence
from akl_lightning.errors import UsageError
from akl_lightning.kernels.classes import FLOOR, Classes
from akl_lightning.projection import Merged, Projection, TopLogProbs, rows_of
from tests import references
from tests.test_alpha_per_token import DIVERGENCES
from tests.test_projection import Largest

TOKENS, STUDENT, TEACHER, COUNT = 7, 30, 24, 17
INF = torch.inf
each = pytest.mark.parametrize("name", DIVERGENCES)


def class_maps(empty: bool = False) -> tuple[Tensor, Tensor]:
    """Every class has outputs on both sides, but for two, some have many and some have one."""
    student = torch.cat([torch.arange(COUNT), torch.randint(8, COUNT, (STUDENT - COUNT,))])
    teacher = torch.cat([torch.arange(COUNT), torch.randint(6, COUNT, (TEACHER - COUNT,))])
    if empty:
        student[student == 3], teacher[teacher == 12] = 4, 1
    return student[torch.randperm(STUDENT)], teacher[torch.randperm(TEACHER)]


def problem(empty: bool = False) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    labels = torch.randint(0, STUDENT, (TOKENS,))
    return *(2 * torch.randn(TOKENS, n, dtype=torch.double) for n in (STUDENT, TEACHER)), labels, *class_maps(empty)


def merged(logits: Tensor, classes: Tensor, count: int) -> Tensor:
    """Logits of classes."""
    floor = logits.detach().amax(-1) - FLOOR
    of = [logits[:, classes == c] for c in range(count)]
    return torch.stack([total(x) if x.shape[1] else floor for x in of], -1)


def total(logits: Tensor) -> Tensor:
    """The logsumexp, without a NaN in the gradient where all are masked."""
    masked = (logits == -INF).all(-1)
    return logits.masked_fill(masked[:, None], 0.0).logsumexp(-1).masked_fill(masked, -INF)


def by_hand(
    student: Tensor, teacher: Tensor, labels: Tensor, of_student: Tensor, of_teacher: Tensor, name: str,
    alpha: Tensor, t: float = 1.0, mu: float = 0.5, head_rule: str = "cover", count: int = COUNT,
) -> tuple[dict[str, Tensor], Tensor]:  # fmt: skip
    """Statistics and the gradient of the student's logits."""
    _, pair, constant = DIVERGENCES[name]
    z = references.logits(student).requires_grad_()
    u, v = merged(z / t, of_student, count), merged(references.logits(teacher) / t, of_teacher, count)
    some = torch.tensor([bool((of_student == c).any() or (of_teacher == c).any()) for c in range(count)])
    u, v = u[:, some], v[:, some]
    # What depends on the merged distributions alone.
    whole, _, unsure = references.compare(u, v, torch.zeros_like(labels), pair, constant, 1.0, 1.0, mu, head_rule)
    assert not unsure.any()
    differs = (whole["head_gap"] + whole["tail_gap"] > 0).double()
    divergence = t**2 * references.pair(
        pair, v.log_softmax(-1), u.log_softmax(-1), constant, whole["head_weight"], differs
    )
    cross_entropy = -z.log_softmax(-1).gather(-1, labels[:, None]).squeeze(-1)
    loss = torch.where(alpha == 0, 0.0, alpha * divergence) + torch.where(alpha == 1, 0.0, (1 - alpha) * cross_entropy)
    (gradient,) = torch.autograd.grad(loss.sum(), z)
    values = {**whole, "loss": loss, "divergence": divergence, "cross_entropy": cross_entropy}
    return {key: value.detach() for key, value in values.items()}, gradient


def run(
    criterion: DistillationCriterion, student: Tensor, teacher: Any, labels: Tensor, alpha: Tensor | None = None
) -> tuple[dict[str, Tensor], Tensor]:
    twin = student.detach().clone().requires_grad_()
    output = criterion(twin, teacher, labels, alpha)
    output.loss.backward()
    assert twin.grad is not None
    return output.statistics, twin.grad


def same(ours: dict[str, Tensor], expected: dict[str, Tensor], rtol: float = 1e-9) -> None:
    assert ours.keys() == expected.keys()
    for statistic, values in expected.items():
        assert torch.allclose(ours[statistic].double(), values.double(), rtol=rtol, atol=rtol / 100), statistic


def criterion(name: str, alpha: float, t: float = 1.0) -> DistillationCriterion:
    return DistillationCriterion(DIVERGENCES[name][0], alpha, t, chunk_size=4)


@each
@pytest.mark.parametrize("empty", [False, True])
@pytest.mark.parametrize("t", [1.0, 2.0])
@pytest.mark.parametrize("alpha", [0.0, 0.6, 1.0])
def test_values_and_gradients(name: str, empty: bool, t: float, alpha: float) -> None:
    student, teacher, labels, of_student, of_teacher = problem(empty)
    classes = Classes(of_student, of_teacher, COUNT)
    ours, gradient = run(criterion(name, alpha, t), student, Merged(teacher, classes), labels)
    weights = torch.full((TOKENS,), alpha, dtype=torch.double)
    expected, right = by_hand(student, teacher, labels, of_student, of_teacher, name, weights, t)
    same(ours, expected)
    assert (gradient - right).norm() <= 1e-9 * right.norm()


@pytest.mark.parametrize("rule", ["cover", "within"])
@pytest.mark.parametrize("mu", [0.1, 0.8, 1.0])
@pytest.mark.parametrize("t", [1.0, 2.0])
def test_heads_are_those_of_the_classes(rule: Any, mu: float, t: float) -> None:
    student, teacher, labels, *maps = problem()
    mixed = DistillationCriterion(AdaptiveKL(mu, rule), 0.7, t)
    ours, gradient = run(mixed, student, Merged(teacher, Classes(*maps, COUNT)), labels)
    weights = torch.full((TOKENS,), 0.7, dtype=torch.double)
    expected, right = by_hand(student, teacher, labels, *maps, "AKL", weights, t, mu, rule)
    same(ours, expected)
    assert (gradient - right).norm() <= 1e-9 * right.norm()


@each
@pytest.mark.parametrize("t", [1.0, 2.0])
def test_a_weight_for_each_token(name: str, t: float) -> None:
    student, teacher, labels, *maps = problem()
    alpha = torch.rand(TOKENS, dtype=torch.double)
    alpha[:2] = torch.tensor([0.0, 1.0])
    ours, gradient = run(criterion(name, 0.9, t), student, Merged(teacher, Classes(*maps, COUNT)), labels, alpha)
    expected, right = by_hand(student, teacher, labels, *maps, name, alpha, t)
    same(ours, expected)
    assert (gradient - right).norm() <= 1e-9 * right.norm()


@settings(max_examples=40, deadline=None)
@given(
    st.integers(1, 12), st.integers(1, 40), st.integers(1, 40), st.sampled_from(sorted(DIVERGENCES)),
    st.sampled_from([0.0, 0.3, 1.0]), st.sampled_from([1.0, 0.7, 3.0]), st.integers(0, 999),
)  # fmt: skip
def test_any_classes(count: int, outputs: int, others: int, name: str, alpha: float, t: float, seed: int) -> None:
    torch.manual_seed(seed)
    student, teacher = torch.randn(3, outputs, dtype=torch.double), torch.randn(3, others, dtype=torch.double)
    maps = torch.randint(0, count, (outputs,)), torch.randint(0, count, (others,))
    labels, weights = torch.randint(0, outputs, (3,)), torch.full((3,), alpha, dtype=torch.double)
    ours, gradient = run(criterion(name, alpha, t), student, Merged(teacher, Classes(*maps, count)), labels)
    expected, right = by_hand(student, teacher, labels, *maps, name, weights, t, count=count)
    same(ours, expected, 1e-8)
    empty = count - len(maps[0].unique())  # each has exp(-FLOOR) of the likeliest output's mass, in each of three rows
    assert (gradient - right).norm() <= 1e-8 * right.norm() + 1e-12 + empty * math.sqrt(3) * math.exp(-FLOOR)


@pytest.mark.parametrize("kind", ["linear", "no bias", "module", "capped", "frozen head"])
@pytest.mark.parametrize("t", [1.0, 2.0])
@pytest.mark.parametrize("empty", [False, True])
@pytest.mark.parametrize("rows", [False, True], ids=["logits arranged", "rows arranged"])
def test_heads_get_their_gradients(
    kind: str, t: float, empty: bool, rows: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sides, "takes_its_rows", lambda device: rows)
    *_, labels, of_student, of_teacher = problem(empty)
    student, teacher = (nn.Linear(8, n, bias=kind != "no bias").double() for n in (STUDENT, TEACHER))
    hidden, others = (2 * torch.randn(TOKENS, 8, dtype=torch.double) for _ in range(2))
    hidden.requires_grad_()
    cap = 1.5 if kind == "capped" else None
    inputs = [hidden, *([] if kind == "frozen head" else student.parameters())]
    student.requires_grad_(kind != "frozen head")
    head: Any = nn.Sequential(student) if kind == "module" else student
    logits, theirs = (Projection(x, h, cap).logits() for x, h in ((hidden, student), (others, teacher)))
    weights = torch.full((TOKENS,), 0.6, dtype=torch.double)
    expected, right = by_hand(logits, theirs, labels, of_student, of_teacher, "AKL", weights, t)
    dense = torch.autograd.grad(logits, inputs, right)
    for module in (teacher, nn.Sequential(teacher)):
        there = Merged(Projection(others, module, cap), Classes(of_student, of_teacher, COUNT))
        output = criterion("AKL", 0.6, t)(Projection(hidden, head, cap), there, labels)
        same(output.statistics, expected)
        for one, other in zip(torch.autograd.grad(output.loss, inputs), dense, strict=True):
            assert one.shape == other.shape and (one - other).norm() <= 1e-9 * other.norm()


@each
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("t", [1.0, 2.0])
def test_permuted_copies_of_one_vocabulary_cost_what_it_does(name: str, dtype: torch.dtype, t: float) -> None:
    student, teacher = (2 * torch.randn(TOKENS, STUDENT, dtype=dtype) for _ in range(2))
    labels, plain = torch.randint(0, STUDENT, (TOKENS,)), criterion(name, 0.6, t)
    expected, right = run(plain, student, teacher, labels)
    tolerance = 2e-6 if dtype == torch.float32 else 1e-13
    identity = Classes(torch.arange(STUDENT), torch.arange(STUDENT), STUDENT)
    ours, gradient = run(plain, student, Merged(teacher, identity), labels)
    if t == 1:
        assert all(torch.equal(ours[key], value) for key, value in expected.items()) and torch.equal(gradient, right)
    same(ours, expected, tolerance)
    order, own = torch.randperm(STUDENT), torch.randperm(STUDENT)
    # Output i of the permuted teacher is token order[i], that of the student own[i].
    there = Merged(teacher[:, order], Classes(own, order, STUDENT))
    permuted, of_permuted = run(plain, student[:, own], there, own.argsort()[labels])
    same(permuted, expected, tolerance)
    assert (of_permuted[:, own.argsort()] - right).norm() <= tolerance * right.norm()


@pytest.mark.parametrize("name", ["mix", "JSD"])
def test_gradcheck(name: str) -> None:
    student, teacher, labels, *maps = problem()
    student, teacher, labels = student[:3], teacher[:3], labels[:3]  # two evaluations for each logit
    there, own = Merged(teacher, Classes(*maps, COUNT)), criterion(name, 0.5)
    student.requires_grad_()
    assert torch.autograd.gradcheck(lambda x: own(x, there, labels).loss, student)


@each
@pytest.mark.parametrize("t", [1.0, 2.0])
@pytest.mark.parametrize("lowest", [-INF, -3.39e38])
def test_masked_outputs(name: str, t: float, lowest: float) -> None:
    """One of a class leaves the rest of it; all of a class mask the class."""
    student, teacher, labels, of_student, of_teacher = problem()
    labels[:] = (of_student == 0).nonzero()[0]
    several, other = int(of_student.bincount().argmax()), int(of_teacher.bincount().argmax())
    student[0, (of_student == several).nonzero()[0]] = lowest
    teacher[1, (of_teacher == other).nonzero()[0]] = lowest
    for row in (2, 3):  # on both sides, and on one alone
        student[row, of_student == several] = lowest
    teacher[2, of_teacher == several] = lowest
    teacher[4, of_teacher == several] = lowest
    student[5, labels[5]] = lowest
    weights = torch.full((TOKENS,), 0.6, dtype=torch.double)
    maps = of_student, of_teacher
    ours, gradient = run(criterion(name, 0.6, t), student, Merged(teacher, Classes(*maps, COUNT)), labels)
    expected, right = by_hand(student, teacher, labels, *maps, name, weights, t)
    assert gradient.isfinite().all() and ours["cross_entropy"][5].isinf()
    sure = torch.arange(TOKENS) != 5 if name != "a user's" else torch.tensor([0, 6])
    for key, values in expected.items():
        assert torch.allclose(ours[key][sure], values[sure], rtol=1e-9, atol=1e-12), key
    plain = torch.tensor([0, 1, 2, 6]) if name != "a user's" else torch.tensor([0, 6])
    assert (gradient - right)[plain].norm() <= 1e-9 * right[plain].norm()
    if name != "a user's":
        assert ours["fkl"].isinf().nonzero().flatten().tolist() == [3, 5]
        assert ours["rkl"].isinf().nonzero().flatten().tolist() == [4]


@pytest.mark.parametrize("t", [1.0, 2.0])
def test_labels_that_are_masked_in_a_class_of_several(t: float) -> None:
    student, teacher, labels, of_student, of_teacher = problem()
    several = (of_student == int(of_student.bincount().argmax())).nonzero().flatten()
    labels[:] = several[0]
    student[0, several[0]] = -INF
    student[1, several] = -INF
    there = Merged(teacher, Classes(of_student, of_teacher, COUNT))
    ours, gradient = run(criterion("JSD", 0.6, t), student, there, labels)
    assert ours["cross_entropy"].isinf().tolist() == [True, True, *[False] * 5] and gradient.isfinite().all()
    assert not ours["loss"].isnan().any()


@pytest.mark.parametrize("bad", [torch.nan, INF])
@pytest.mark.parametrize("t", [1.0, 2.0])
def test_what_is_no_number_is_noticed(bad: float, t: float) -> None:
    for side in (0, 1):
        for output in range(10):
            *logits, labels, of_student, of_teacher = problem()
            logits[side][1, output] = bad
            there = Merged(logits[1], Classes(of_student, of_teacher, COUNT))
            statistics, _ = run(criterion("AKL", 0.5, t), logits[0], there, labels)
            for key in ("loss", "divergence", "fkl", "rkl", "head_gap", "head_weight"):
                assert statistics[key].isnan().nonzero().flatten().tolist() == [1], (key, side)


def test_a_class_that_one_side_lacks_is_never_infinite() -> None:
    student, teacher, labels, *maps = problem(empty=True)
    student[:, maps[0] == 12] += 20  # nearly all mass on what the teacher lacks
    teacher[:, maps[1] == 3] += 20
    for name in DIVERGENCES:
        for t in (1.0, 2.0):
            statistics, gradient = run(criterion(name, 1.0, t), student, Merged(teacher, Classes(*maps, COUNT)), labels)
            assert all(values.isfinite().all() for values in statistics.values()) and gradient.isfinite().all()
            assert (statistics["fkl"] > 10).all() and (statistics["rkl"] > 10).all()


def test_one_huge_class_and_classes_of_any_size() -> None:
    """In float32, against float64."""
    sizes = [1] * 40 + list(range(1, 70)) + [3000]
    of_student = torch.arange(len(sizes)).repeat_interleave(torch.tensor(sizes))
    of_student = of_student[torch.randperm(len(of_student))]
    of_teacher = torch.cat([torch.arange(len(sizes)), torch.randint(0, len(sizes), (500,))])
    student, teacher = 2 * torch.randn(5, len(of_student)), 2 * torch.randn(5, len(of_teacher))
    labels, weights = torch.randint(0, len(of_student), (5,)), torch.full((5,), 0.5, dtype=torch.double)
    maps = of_student, of_teacher
    for t in (1.0, 2.0):
        there = Merged(teacher, Classes(*maps, len(sizes)))
        ours, gradient = run(criterion("FKL", 0.5, t), student, there, labels)
        expected, right = by_hand(student, teacher, labels, *maps, "FKL", weights, t, count=len(sizes))
        same(ours, expected, 1e-5)
        assert (gradient - right).norm() <= 1e-5 * right.norm()


@pytest.mark.parametrize("rows", [False, True], ids=["logits arranged", "rows arranged"])
@pytest.mark.parametrize("name", ["AKL", "a user's"])
@pytest.mark.parametrize("t", [1.0, 2.0])
def test_no_tensor_of_all_logits_exists(name: str, t: float, rows: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sides, "takes_its_rows", lambda device: rows)
    tokens, outputs, others, width = 64, 1000, 900, 8
    maps = [torch.arange(n).fmod(700).flip(0) for n in (outputs, others)]
    student, teacher = nn.Linear(width, outputs), nn.Linear(width, others)
    hidden, there = torch.randn(tokens, width).requires_grad_(), torch.randn(tokens, width)
    labels = torch.randint(0, outputs, (tokens,))
    classes = Merged(Projection(there, teacher), Classes(maps[0], maps[1], 700))

    def largest(chunk_size: int) -> int:
        with Largest() as watch:
            own = DistillationCriterion(DIVERGENCES[name][0], 0.5, t, chunk_size=chunk_size)
            own(Projection(hidden, student), classes, labels).loss.backward()
        return watch.elements

    # A weight, or the reference's memory for the rows of a chunk.
    assert largest(4) <= max(outputs * width, 4 * 4 * outputs) < tokens * others
    assert largest(tokens) >= tokens * outputs, "the watch would notice"


def test_no_tokens() -> None:
    none, there = torch.zeros(0, STUDENT, requires_grad=True), torch.zeros(0, TEACHER)
    for t in (1.0, 2.0):
        output = criterion("AKL", 0.5, t)(
            none, Merged(there, Classes(*class_maps(), COUNT)), torch.zeros(0, dtype=torch.long)
        )
        output.loss.backward()
        assert output.loss == 0 and len(output.statistics) == 9


def test_without_a_gradient_the_values_are_the_same() -> None:
    student, teacher, labels, *maps = problem()
    there = Merged(teacher, Classes(*maps, COUNT))
    for t in (1.0, 2.0):
        with torch.no_grad():
            alone = criterion("AKL", 0.5, t)(student, there, labels).statistics
        same(alone, run(criterion("AKL", 0.5, t), student, there, labels)[0], 1e-12)


@pytest.mark.parametrize("t", [1.0, 2.0])
def test_distributions_to_look_at(t: float) -> None:
    student, teacher, labels, of_student, of_teacher = problem()
    there = Merged(teacher, Classes(of_student, of_teacher, COUNT + 1))  # a class that nobody has
    q, p = criterion("AKL", 0.5, t).distributions(student, there, labels)
    for ours, logits, classes in ((q, student, of_student), (p, teacher, of_teacher)):
        right = torch.zeros(TOKENS, COUNT + 1, dtype=torch.double).index_add_(1, classes, (logits / t).softmax(-1))
        assert torch.allclose(ours, right, rtol=1e-9)


def test_rows_of_some_tokens_alone() -> None:
    _, teacher, _, *maps = problem()
    some = rows_of(Merged(teacher, Classes(*maps, COUNT)), slice(2, 4))
    assert isinstance(some, Merged) and isinstance(some.logits, Tensor) and torch.equal(some.logits, teacher[2:4])


def test_what_does_not_fit_is_refused() -> None:
    student, teacher, labels, of_student, of_teacher = problem()
    classes = Classes(of_student, of_teacher, COUNT)
    with pytest.raises(UsageError, match="the student has 29 outputs, and the classes are of 30: give each output"):
        run(DistillationCriterion(), student[:, :29], Merged(teacher, classes), labels.clamp(max=28))
    with pytest.raises(UsageError, match="the teacher has 23 outputs, and the classes are of 24: give each output"):
        run(DistillationCriterion(), student, Merged(teacher[:, :23], classes), labels)
    top = TopLogProbs(teacher.topk(3).values, teacher.topk(3).indices, teacher[:, :1], TEACHER)
    with pytest.raises(UsageError, match="of a teacher over another vocabulary all logits are needed"):
        run(DistillationCriterion(), student, Merged(top, classes), labels)  # type: ignore[arg-type]
    with pytest.raises(UsageError, match=r"teacher logits .* pass logits \[tokens, vocab\]"):
        run(DistillationCriterion(), student, Merged(teacher[None], classes), labels)
    with pytest.raises(UsageError, match="classes of the teacher go from 0 to 16: give each output one of 0 to 15"):
        Classes(of_student.clamp(max=15), of_teacher, COUNT - 1)
    with pytest.raises(UsageError, match=r"classes of the student \[30\] of torch.float32: give one int64 an output"):
        Classes(of_student.float(), of_teacher, COUNT)


class Entropy(Divergence):
    """Sees how many classes it is given."""

    def compare(self, student: Tensor, teacher: Tensor) -> Tensor:
        assert student.shape == teacher.shape and student.shape[1] == COUNT
        return (student.exp() - teacher.exp()).square().sum(-1)


def test_a_users_divergence_sees_classes() -> None:
    student, teacher, labels, of_student, of_teacher = problem()
    twin = student.clone().requires_grad_()
    q, p = merged(twin, of_student, COUNT).softmax(-1), merged(teacher, of_teacher, COUNT).softmax(-1)
    loss = (q - p).square().sum()
    there = Merged(teacher, Classes(of_student, of_teacher, COUNT))
    ours, gradient = run(DistillationCriterion(Entropy(), 1.0), student, there, labels)
    assert torch.allclose(ours["loss"].sum(), loss.detach(), rtol=1e-9)
    (right,) = torch.autograd.grad(loss, twin)
    assert (gradient - right).norm() <= 1e-9 * right.norm()
