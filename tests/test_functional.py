"""Every divergence against an independent float64 formula: plain Python, one row at a time, no torch."""

import math
from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from akl_lightning import functional as F
from akl_lightning.errors import UsageError

INF = math.inf


def softmax(row: list[float], t: float = 1.0) -> list[float]:
    top = max(row)
    exps = [math.exp((x - top) / t) for x in row]
    total = math.fsum(exps)
    return [e / total for e in exps]


def kl(a: list[float], b: list[float]) -> float:
    terms = [0.0 if x == 0 else INF if y == 0 else x * math.log(x / y) for x, y in zip(a, b, strict=True)]
    return math.fsum(terms)


def head(p: list[float], mu: float, rule: str) -> list[float]:
    """How far each token belongs to it: one group of equals after another, as many of each as are needed, or fit."""
    members, mass = [0.0] * len(p), [0.0]
    for value in sorted(set(p) - {0.0}, reverse=True):
        group = [i for i, x in enumerate(p) if x == value]
        taken = 0
        while taken < len(group):
            short = math.fsum(mass) < mu * (1 - 1e-6)
            fits = math.fsum([*mass, value]) <= mu * (1 + 1e-6) or len(mass) == 1  # the top token always belongs to it
            if not (mu == 1 or (short if rule == "cover" else fits)):
                break
            mass.append(value)
            taken += 1
        for i in group:
            members[i] = taken / len(group)
        if taken < len(group):
            break
    return members


def weights(p: list[float], q: list[float], mu: float, rule: str) -> tuple[float, float]:
    members = head(p, mu, rule)
    gaps = [abs(x - y) for x, y in zip(p, q, strict=True)]
    g_head = math.fsum(g * m for g, m in zip(gaps, members, strict=True))
    g_tail = math.fsum(g * (1 - m) for g, m in zip(gaps, members, strict=True))
    return g_head, g_tail


def akl(p: list[float], q: list[float], mu: float = 0.5, rule: str = "cover") -> float:
    g_head, g_tail = weights(p, q, mu, rule)
    if g_head + g_tail == 0:
        return 0.0
    w = g_head / (g_head + g_tail)
    return (w * kl(p, q) if w else 0.0) + ((1 - w) * kl(q, p) if w < 1 else 0.0)


def mixed(a: list[float], b: list[float], weight: float) -> list[float]:
    return [weight * x + (1 - weight) * y for x, y in zip(a, b, strict=True)]


def jsd(p: list[float], q: list[float], beta: float) -> float:
    m = mixed(p, q, beta)
    return beta * kl(p, m) + (1 - beta) * kl(q, m)


CASES: dict[str, tuple[Callable[..., Tensor], Callable[[list[float], list[float]], float]]] = {
    "forward_kl": (F.forward_kl, kl),
    "reverse_kl": (F.reverse_kl, lambda p, q: kl(q, p)),
    "adaptive_kl": (F.adaptive_kl, akl),
    "adaptive_kl within 0.8": (
        lambda s, t, **k: F.adaptive_kl(s, t, mu=0.8, head_rule="within", **k),
        lambda p, q: akl(p, q, 0.8, "within"),
    ),
    "weighted_kl": (
        lambda s, t, **k: F.weighted_kl(s, t, forward_weight=0.3, **k),
        lambda p, q: 0.3 * kl(p, q) + 0.7 * kl(q, p),
    ),
    "jensen_shannon": (lambda s, t, **k: F.jensen_shannon(s, t, beta=0.2, **k), lambda p, q: jsd(p, q, 0.2)),
    "skew_forward_kl": (
        lambda s, t, **k: F.skew_forward_kl(s, t, skew=0.1, **k),
        lambda p, q: kl(p, mixed(p, q, 0.1)),
    ),
    "skew_reverse_kl": (
        lambda s, t, **k: F.skew_reverse_kl(s, t, skew=0.1, **k),
        lambda p, q: kl(q, mixed(q, p, 0.1)),
    ),
    "total_variation": (
        F.total_variation,
        lambda p, q: 0.5 * math.fsum(abs(x - y) for x, y in zip(p, q, strict=True)),
    ),
}
ALL = pytest.mark.parametrize("name", CASES)


def pair(tokens: int = 6, vocab: int = 50, scale: float = 3.0) -> tuple[Tensor, Tensor]:
    return scale * torch.randn(tokens, vocab, dtype=torch.float64), scale * torch.randn(
        tokens, vocab, dtype=torch.float64
    )


@ALL
@pytest.mark.parametrize("temperature", [1.0, 2.5])
@pytest.mark.parametrize("vocab", [2, 50, 3000])
def test_values(name: str, temperature: float, vocab: int) -> None:
    ours, formula = CASES[name]
    student, teacher = pair(vocab=vocab)
    expected = [
        temperature**2 * formula(softmax(t, temperature), softmax(s, temperature))
        for s, t in zip(student.tolist(), teacher.tolist(), strict=True)
    ]
    expected = torch.tensor(expected, dtype=torch.float64)
    assert torch.allclose(ours(student, teacher, temperature=temperature), expected, rtol=1e-9, atol=1e-12)
    in_float32 = ours(student.float(), teacher.float(), temperature=temperature)
    assert in_float32.dtype == torch.float32
    assert torch.allclose(in_float32.double(), expected, rtol=2e-5, atol=2e-6)


@ALL
def test_gradients_match_finite_differences(name: str) -> None:
    ours, _ = CASES[name]
    student, teacher = pair(tokens=3, vocab=7, scale=1.0)
    student.requires_grad_()
    if "adaptive" in name:
        # The weights are detached: hold them fixed, as the gradient does.
        mu, rule = (0.8, "within") if "within" in name else (0.5, "cover")
        w = []
        for s, t in zip(student.tolist(), teacher.tolist(), strict=True):
            g_head, g_tail = weights(softmax(t), softmax(s), mu, rule)
            w.append(g_head / (g_head + g_tail))
        w = torch.tensor(w, dtype=torch.float64)

        def fixed(s: Tensor) -> Tensor:
            return w * F.forward_kl(s, teacher) + (1 - w) * F.reverse_kl(s, teacher)

        assert torch.autograd.gradcheck(fixed, student)
        (mine,) = torch.autograd.grad(ours(student, teacher).sum(), student)
        (expected,) = torch.autograd.grad(fixed(student).sum(), student)
        assert torch.allclose(mine, expected, rtol=1e-10, atol=1e-14)
    else:
        assert torch.autograd.gradcheck(lambda s: ours(s, teacher), student)


@ALL
def test_the_teacher_gets_no_gradient(name: str) -> None:
    student, teacher = pair()
    student.requires_grad_()
    teacher.requires_grad_()
    CASES[name][0](student, teacher).sum().backward()
    assert teacher.grad is None
    assert student.grad.abs().sum() > 0


# Binary fractions: a shift of them is exact, so that it cannot make equals of two logits that differ.
fractions = st.integers(-8192, 8192).map(lambda number: number / 1024)
rows = st.integers(2, 12).flatmap(
    lambda vocab: st.tuples(
        *[st.lists(fractions, min_size=vocab, max_size=vocab) for _ in range(2)],
        st.permutations(range(vocab)),
    )
)


@ALL
@settings(max_examples=60, deadline=None)
@given(rows, fractions)
def test_properties(name: str, drawn: tuple[list[float], list[float], list[int]], shift: float) -> None:
    ours, _ = CASES[name]
    student, teacher = (torch.tensor(row, dtype=torch.float64) for row in drawn[:2])
    value = ours(student, teacher)
    assert value >= -1e-12
    gap = (student.softmax(-1) - teacher.softmax(-1)).abs().max()
    # Pinsker: a divergence is of the order of the squared gap.
    if gap > 1e-3:
        assert value > 1e-9
    assert ours(teacher, teacher).abs() < 1e-12
    assert torch.allclose(ours(student + shift, teacher - shift), value, atol=1e-9)
    assert torch.allclose(ours(student[drawn[2]], teacher[drawn[2]]), value, atol=1e-9)


@settings(max_examples=100, deadline=None)
@given(
    st.lists(st.integers(0, 40), min_size=1, max_size=60).filter(any),
    st.sampled_from([1e-6, 0.1, 0.25, 0.5, 0.75, 0.9, 1.0]),
    st.sampled_from(["cover", "within"]),
)
def test_head_of_any_distribution(masses: list[int], mu: float, rule: str) -> None:
    total = sum(masses)
    p = [mass / total for mass in masses]
    # Integers leave many ties, and sums of them that are mu itself, which counts as reached from both sides.
    for dtype in (torch.float64, torch.float32):
        members = F.head_mask(torch.tensor(p, dtype=dtype), mu, rule)
        assert members.dtype == dtype
        assert members.tolist() == pytest.approx(head(p, mu, rule), rel=1e-6)


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.integers(0, 9), min_size=2, max_size=40)
    .filter(any)
    .flatmap(lambda masses: st.tuples(st.just(masses), st.permutations(range(len(masses))))),
    st.floats(0.01, 1.0),
    st.sampled_from(["cover", "within"]),
)
def test_the_head_does_not_depend_on_the_order(drawn: tuple[list[int], list[int]], mu: float, rule: str) -> None:
    p = torch.tensor(drawn[0]) / sum(drawn[0])
    members = F.head_mask(p, mu, rule)
    assert torch.equal(F.head_mask(p[drawn[1]], mu, rule), members[drawn[1]])
    assert len(set(members.tolist()) - {0.0, 1.0}) <= 1, "one group of equals shares"
    mass = (p.double() * members).sum()
    if mu < 1 and rule == "cover":
        assert mass >= mu * (1 - 2e-6)
    elif mu < 1 and members.sum() > 1.001:
        assert mass <= mu * (1 + 2e-6)


@pytest.mark.parametrize("vocab", [3, 33, 600, 9000])
def test_head_widens_to_the_whole_vocabulary(vocab: int) -> None:
    uniform = torch.full((2, vocab), 1 / vocab)
    assert (F.head_mask(uniform, mu=1.0) == 1).all()
    half = F.head_mask(uniform, mu=0.5)
    assert torch.equal(half, torch.full_like(half, math.ceil(vocab / 2) / vocab)), "equals share"
    peaked = torch.zeros(1, vocab)
    peaked[0, vocab // 2] = 1.0
    sizes = F.head_mask(torch.cat([peaked, uniform]), 0.5).double().sum(-1)
    assert sizes.tolist() == pytest.approx([1] + [math.ceil(vocab / 2)] * 2, rel=1e-6)


def test_head_by_hand() -> None:
    p = torch.tensor([[0.05, 0.30, 0.25, 0.40], [0.7, 0.1, 0.1, 0.1]])
    # 0.40 + 0.30 crosses 0.5; "within" stops before it, but always keeps the top token.
    assert F.head_mask(p, 0.5, "cover").tolist() == [[0, 1, 0, 1], [1, 0, 0, 0]]
    assert F.head_mask(p, 0.5, "within").tolist() == [[0, 0, 0, 1], [1, 0, 0, 0]]
    q = torch.tensor([[0.15, 0.10, 0.25, 0.50], [0.7, 0.1, 0.1, 0.1]])
    head_gap, tail_gap = F.head_tail_gap(q, p)
    assert torch.allclose(head_gap, torch.tensor([0.3, 0.0]))
    assert torch.allclose(tail_gap, torch.tensor([0.1, 0.0]), atol=1e-7)
    assert torch.allclose(F.head_weight(head_gap, tail_gap), torch.tensor([0.75, 0.5]))


def test_equals_share_the_crossing_by_hand() -> None:
    p = torch.tensor([0.2, 0.1, 0.2, 0.3, 0.2])
    # 0.3 and one of the three equals make 0.5, which float32 misses by little; 0.6 needs two and has room for one.
    for rule, mu, share in (("cover", 0.5, 1), ("within", 0.5, 1), ("cover", 0.6, 2), ("within", 0.6, 1)):
        expected = torch.tensor([share / 3, 0, share / 3, 1, share / 3])
        assert torch.equal(F.head_mask(p, mu, rule), expected), (rule, mu)
    # None of the top tokens fits, so one of the two belongs to it, half of each.
    assert F.head_mask(torch.tensor([0.4, 0.4, 0.2]), 0.3, "within").tolist() == [0.5, 0.5, 0]
    q = torch.tensor([0.3, 0.1, 0.2, 0.3, 0.1])
    assert [gap.item() for gap in F.head_tail_gap(q, p)] == pytest.approx([0.2 / 3, 0.4 / 3], abs=1e-7)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_the_lowest_number_of_a_dtype_is_a_mask(dtype: torch.dtype) -> None:
    student, teacher = (torch.randn(2, 5).to(dtype) for _ in range(2))
    student[0, 3] = teacher[0, 3] = student[1, 2] = torch.finfo(dtype).min
    for temperature in (0.5, 2.0):
        assert F.log_probs(student, temperature)[0, 3] == -INF
        assert F.forward_kl(student, teacher, temperature).isinf().tolist() == [False, True]


@pytest.mark.parametrize("mu", [0.25, 0.5, 0.75, 1.0])
def test_rules_agree_where_the_crossing_falls_on_mu(mu: float) -> None:
    p = torch.tensor([0.125, 0.25, 0.25, 0.0, 0.25, 0.125])  # dyadic: sums are exact
    assert torch.equal(F.head_mask(p, mu, "cover"), F.head_mask(p, mu, "within"))


def test_masked_on_both_sides_counts_zero() -> None:
    student, teacher = pair(vocab=5)
    for name, (ours, _) in CASES.items():
        masked_student = torch.cat([student, torch.full((6, 2), -INF)], -1).requires_grad_()
        masked_teacher = torch.cat([teacher, torch.full((6, 2), -INF)], -1)
        value = ours(masked_student, masked_teacher)
        assert torch.allclose(value, ours(student, teacher)), name
        value.sum().backward()
        assert masked_student.grad.isfinite().all(), name


def test_masked_on_one_side_is_infinite_with_a_finite_gradient() -> None:
    free, masked = torch.zeros(1, 3), torch.tensor([[0.0, 0.0, -INF]])
    for student, teacher, infinite in (
        (masked, free, {"forward_kl", "adaptive_kl", "adaptive_kl within 0.8", "weighted_kl"}),
        (free, masked, {"reverse_kl", "adaptive_kl", "adaptive_kl within 0.8", "weighted_kl"}),
    ):
        for name, (ours, _) in CASES.items():
            student = student.detach().clone().requires_grad_()
            value = ours(student, teacher)
            value.sum().backward()
            assert value.isinf().item() == (name in infinite), name
            assert student.grad.isfinite().all(), name


def test_a_zero_weight_times_infinity_is_zero() -> None:
    student, teacher = torch.tensor([[0.0, 0.0, -INF]]), torch.zeros(1, 3)
    assert F.weighted_kl(student, teacher, forward_weight=0.0).isfinite().all()
    assert F.weighted_kl(teacher, student, forward_weight=1.0).isfinite().all()


def test_equal_distributions_cost_nothing_and_pull_nowhere() -> None:
    logits = torch.randn(4, 1000, requires_grad=True)
    value = F.adaptive_kl(logits, logits.detach())
    value.sum().backward()
    assert value.tolist() == [0.0] * 4
    assert logits.grad.abs().max() == 0


def test_low_precision_logits_are_compared_in_float32() -> None:
    student, teacher = (x.bfloat16() for x in pair(vocab=200))
    assert torch.equal(F.adaptive_kl(student, teacher), F.adaptive_kl(student.float(), teacher.float()))


@pytest.mark.parametrize("mu", [0.0, -0.5, 1.01, math.nan])
def test_bad_mu(mu: float) -> None:
    with pytest.raises(UsageError, match=r"mu must lie in \(0, 1\]"):
        F.adaptive_kl(torch.zeros(1, 2), torch.zeros(1, 2), mu=mu)


@pytest.mark.parametrize("temperature", [0.0, -1.0, math.inf, math.nan])
def test_bad_temperature(temperature: float) -> None:
    with pytest.raises(UsageError, match="temperature must be a positive number"):
        F.forward_kl(torch.zeros(1, 2), torch.zeros(1, 2), temperature=temperature)


def test_other_bad_arguments() -> None:
    two, three = torch.zeros(1, 2), torch.zeros(1, 3)
    with pytest.raises(UsageError, match="differ in shape"):
        F.forward_kl(two, three)
    with pytest.raises(UsageError, match="head_rule must be one of cover, within"):
        F.adaptive_kl(two, two, head_rule="outside")  # type: ignore[arg-type]
    with pytest.raises(UsageError, match=r"beta must lie in \(0, 1\)"):
        F.jensen_shannon(two, two, beta=1.0)
    with pytest.raises(UsageError, match=r"skew must lie in \[0, 1\]"):
        F.skew_forward_kl(two, two, skew=-0.1)
