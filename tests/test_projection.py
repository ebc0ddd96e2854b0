"""The chunked criterion against a dense float64 computation, written here from the formulas."""

import math
import traceback
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from akl_lightning import functional as F
from akl_lightning import projection, sides
from akl_lightning.criterion import CriterionOutput, DistillationCriterion
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
from akl_lightning.kernels import reference
from akl_lightning.products import columns_for, resized, without_tf32
from akl_lightning.projection import Projection, TopLogProbs, project_and_compare

TOKENS, HIDDEN, VOCAB = 37, 24, 9001  # a vocabulary that is large enough for the search of the head by groups


class Case:
    """Hidden states and heads of a student and a larger teacher whose head is some tokens, as in a language model."""

    def __init__(
        self, tokens: int = TOKENS, vocab: int = VOCAB, bias: bool = False, dtype: torch.dtype = torch.float32
    ):
        generator = torch.Generator().manual_seed(5)

        def normal(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator, dtype=torch.float64)

        self.labels = torch.randint(0, vocab, (tokens,), generator=generator)
        self.student = head(normal(vocab, HIDDEN) * 0.5, normal(vocab) if bias else None, dtype)
        self.teacher = head(normal(vocab, 2 * HIDDEN) * 0.4, normal(vocab) if bias else None, dtype)
        sharpness = torch.linspace(0.5, 4, tokens, dtype=torch.float64)[:, None]
        self.student_hidden = (sharpness * normal(tokens, HIDDEN)).to(dtype).requires_grad_()
        self.teacher_hidden = (sharpness * normal(tokens, 2 * HIDDEN)).to(dtype)

    def run(self, criterion: DistillationCriterion, scale: float = 1.0, **options: Any) -> CriterionOutput:
        for tensor in self.inputs:
            tensor.grad = None
        student = Projection(self.student_hidden, self.student, **options)
        output = criterion(student, Projection(self.teacher_hidden, self.teacher, **options), self.labels)
        (output.loss * scale).backward()
        return output

    @property
    def inputs(self) -> list[Tensor]:
        return [self.student_hidden, *self.student.parameters()]

    @property
    def gradients(self) -> list[Tensor]:
        return [tensor.grad for tensor in self.inputs]


def head(weight: Tensor, bias: Tensor | None, dtype: torch.dtype) -> nn.Linear:
    linear = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None, dtype=dtype)
    with torch.no_grad():
        linear.weight.copy_(weight)
        if bias is not None:
            linear.bias.copy_(bias)
    return linear


def in_head(p: Tensor, mu: float, rule: str) -> Tensor:
    """By sorting, as the authors do."""
    ordered, order = p.sort(descending=True, stable=True)
    mass = ordered.cumsum(-1)
    inside = mass - ordered < mu if rule == "cover" else mass <= mu
    inside[:, 0] = True
    return torch.zeros_like(inside).scatter(-1, order, inside & (ordered > 0))


class Dense:
    """Every statistic and gradient in float64 from the whole ``[tokens, vocab]``."""

    def __init__(
        self,
        case: Case,
        divergence: str,
        alpha: float,
        temperature: float,
        mu: float,
        rule: str,
        soft_cap: float | None = None,
        vocab: int | None = None,
    ) -> None:
        inputs = [tensor.detach().double().requires_grad_() for tensor in case.inputs]
        s = nn.functional.linear(*inputs)
        t = nn.functional.linear(
            case.teacher_hidden.double(), *(parameter.detach().double() for parameter in case.teacher.parameters())
        )
        if soft_cap is not None:
            s, t = soft_cap * torch.tanh(s / soft_cap), soft_cap * torch.tanh(t / soft_cap)
        s, t = s[:, :vocab], t[:, :vocab]
        log_q, log_p = (s / temperature).log_softmax(-1), (t / temperature).log_softmax(-1)
        p, q = log_p.exp(), log_q.exp()
        gap, inside = (p - q).abs().detach(), in_head(p, mu, rule)
        head_gap, tail_gap = (gap * inside).sum(-1), (gap * ~inside).sum(-1)
        w = head_gap / (head_gap + tail_gap)
        fkl, rkl = (p * (log_p - log_q)).sum(-1), (q * (log_q - log_p)).sum(-1)
        m = 0.3 * p + 0.7 * q
        value = {
            "AdaptiveKL": w * fkl + (1 - w) * rkl,
            "ForwardKL": fkl,
            "ReverseKL": rkl,
            "WeightedKL": 0.2 * fkl + 0.8 * rkl,
            "JensenShannon": 0.3 * (p * (log_p - m.log())).sum(-1) + 0.7 * (q * (log_q - m.log())).sum(-1),
            "SkewKL": (p * (log_p - (0.3 * p + 0.7 * q).log())).sum(-1),
            "TotalVariation": 0.5 * (p - q).abs().sum(-1),
            "Hellinger": 1 - (p * q).sqrt().sum(-1),
        }[divergence]
        divergence_ = temperature**2 * value
        cross_entropy = -s.log_softmax(-1).gather(-1, case.labels[:, None]).squeeze(-1)
        loss = alpha * divergence_ + (1 - alpha) * cross_entropy
        loss.sum().backward()
        self.gradients = [tensor.grad for tensor in inputs]
        self.statistics = {
            "loss": loss, "divergence": divergence_, "cross_entropy": cross_entropy, "fkl": fkl, "rkl": rkl,
            "head_gap": head_gap, "tail_gap": tail_gap, "head_weight": w,
            "top1_agreement": (p.argmax(-1) == q.argmax(-1)).double(),
        }  # fmt: skip
        # Rows whose mass falls within rounding of mu may go either way.
        mass = p.sort(descending=True).values.cumsum(-1)
        self.sure = ((mass - mu).abs() > 1e-6).all(-1) if mu < 1 else torch.ones_like(w, dtype=torch.bool)


class Hellinger(Divergence):
    """A user's own."""

    def compare(self, student: Tensor, teacher: Tensor) -> Tensor:
        return 1 - (0.5 * (student + teacher)).exp().sum(-1)


DIVERGENCES = {
    "AdaptiveKL": AdaptiveKL(),
    "ForwardKL": ForwardKL(),
    "ReverseKL": ReverseKL(),
    "WeightedKL": WeightedKL(0.2),
    "JensenShannon": JensenShannon(0.3),
    "SkewKL": SkewKL(0.3),
    "TotalVariation": TotalVariation(),
    "Hellinger": Hellinger(),
}


def check(case: Case, output: CriterionOutput, dense: Dense, scale: float = 1.0) -> None:
    assert set(output.statistics) == set(dense.statistics)
    for name, expected in dense.statistics.items():
        ours, expected = output.statistics[name].double()[dense.sure], expected[dense.sure].detach()
        assert ((ours - expected).abs() <= 1e-5 * expected.abs() + 1e-6).all(), name
    assert dense.statistics["fkl"].min() >= 0.01
    for ours, expected in zip(case.gradients, dense.gradients, strict=True):
        assert (ours.double() / scale - expected).norm() <= 1e-5 * expected.norm()


@pytest.mark.parametrize("name", DIVERGENCES)
@pytest.mark.parametrize("chunk_size", [1, 8, TOKENS + 5, None])
def test_every_divergence_and_chunk_size(name: str, chunk_size: int | None) -> None:
    case = Case()
    dense = Dense(case, name, alpha=0.4, temperature=1.0, mu=0.5, rule="cover")
    assert dense.sure.all()
    check(case, case.run(DistillationCriterion(DIVERGENCES[name], 0.4, chunk_size=chunk_size)), dense)


@pytest.mark.parametrize("alpha", [0.0, 0.4, 1.0])
@pytest.mark.parametrize("temperature", [0.7, 2.0])
@pytest.mark.parametrize("name", ["AdaptiveKL", "Hellinger"])
def test_temperature_and_alpha(name: str, temperature: float, alpha: float) -> None:
    case = Case(vocab=700)
    output = case.run(DistillationCriterion(DIVERGENCES[name], alpha, temperature, chunk_size=8))
    check(case, output, Dense(case, name, alpha, temperature, 0.5, "cover"))


@pytest.mark.parametrize("mu", [0.05, 0.5, 0.95, 1.0])
@pytest.mark.parametrize("rule", ["cover", "within"])
def test_heads_of_every_size(mu: float, rule: str) -> None:
    case = Case()
    dense = Dense(case, "AdaptiveKL", 1.0, 1.0, mu, rule)
    output = case.run(DistillationCriterion(AdaptiveKL(mu, rule), 1.0, chunk_size=8))  # type: ignore[arg-type]
    if mu < 1:
        assert dense.sure.sum() > TOKENS / 2
        for name in ("head_gap", "tail_gap", "head_weight", "divergence"):
            ours, expected = output.statistics[name].double(), dense.statistics[name].detach()
            assert torch.allclose(ours[dense.sure], expected[dense.sure], rtol=1e-5, atol=1e-6), name
        if dense.sure.all():
            check(case, output, dense)
    else:
        # Every token is head that has mass in float32.
        assert output.statistics["tail_gap"].max() < 1e-5
        assert torch.allclose(output.statistics["divergence"], output.statistics["fkl"], rtol=1e-4)


@pytest.mark.parametrize("mu", [0.5, 1.0])
def test_a_uniform_teacher(mu: float) -> None:
    """Its head is half of the vocabulary, or all of it, and every token ties with every other."""
    student = torch.randn(3, VOCAB, dtype=torch.float64)
    teacher = torch.zeros(3, VOCAB, dtype=torch.float64)
    output = DistillationCriterion(AdaptiveKL(mu), 1.0)(student, teacher, torch.zeros(3, dtype=torch.long))
    gap = (student.softmax(-1) - 1 / VOCAB).abs().sum(-1)
    share = math.ceil(mu * VOCAB) / VOCAB
    assert torch.allclose(output.statistics["head_gap"], share * gap)
    assert torch.allclose(output.statistics["tail_gap"], (1 - share) * gap)


def test_bias_and_soft_cap() -> None:
    case = Case(vocab=700, bias=True)
    output = case.run(DistillationCriterion(alpha=0.4, chunk_size=8), soft_cap=5.0)
    check(case, output, Dense(case, "AdaptiveKL", 0.4, 1.0, 0.5, "cover", soft_cap=5.0))


@pytest.mark.parametrize("soft_cap", [None, 5.0])
def test_gradients_by_finite_differences(soft_cap: float | None) -> None:
    case = Case(tokens=3, vocab=9, bias=True, dtype=torch.float64)
    criterion = DistillationCriterion(ReverseKL(), alpha=0.4, temperature=1.3, chunk_size=2)

    def loss(hidden: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        linear = nn.Linear(HIDDEN, 9, dtype=torch.float64)
        del linear.weight, linear.bias
        linear.weight, linear.bias = weight, bias
        student = Projection(hidden, linear, soft_cap)
        return criterion(student, Projection(case.teacher_hidden, case.teacher, soft_cap), case.labels).loss

    assert torch.autograd.gradcheck(loss, case.inputs)


def test_ready_made_logits_are_a_projection_already_done() -> None:
    case = Case()
    criterion = DistillationCriterion(chunk_size=8)
    projected = case.run(criterion)
    expected = [gradient.clone() for gradient in case.gradients]
    teacher_logits = case.teacher(case.teacher_hidden).detach()
    for teacher in (teacher_logits, Projection(case.teacher_hidden, case.teacher)):
        for tensor in case.inputs:
            tensor.grad = None
        kept = teacher_logits.clone()
        output = criterion(case.student(case.student_hidden), teacher, case.labels)
        output.loss.backward()
        assert torch.equal(teacher_logits, kept), "the caller's logits are not for us to overwrite"
        assert torch.allclose(output.loss, projected.loss)
        for ours, before in zip(case.gradients, expected, strict=True):
            assert (ours - before).norm() <= 1e-5 * before.norm()


def test_outputs_of_the_teacher_alone_are_cut_without_a_trace() -> None:
    case = Case(vocab=700)
    plain = case.run(DistillationCriterion(chunk_size=8))
    expected = [gradient.clone() for gradient in case.gradients]
    weight = case.teacher.weight.detach()
    case.teacher = head(torch.cat([weight, torch.randn(20, weight.shape[1])]), None, torch.float32)
    output = case.run(DistillationCriterion(chunk_size=8))
    assert torch.allclose(output.loss, plain.loss)
    assert torch.allclose(case.gradients[0], expected[0], atol=1e-6)
    assert torch.allclose(case.gradients[1], expected[1], atol=1e-6)


class Adapted(nn.Module):
    """A frozen head with a trainable one of low rank beside it, as LoRA does it."""

    def __init__(self, base: nn.Linear) -> None:
        super().__init__()
        self.base = base.requires_grad_(False)
        self.down = nn.Linear(base.in_features, 2, bias=False)
        self.up = nn.Linear(2, base.out_features, bias=False)

    def forward(self, hidden: Tensor) -> Tensor:
        return self.base(hidden) + self.up(self.down(hidden))


@pytest.mark.parametrize("soft_cap", [None, 5.0])
def test_any_module_may_be_the_head(soft_cap: float | None) -> None:
    case = Case(vocab=700)
    case.student = Adapted(case.student)  # type: ignore[assignment]
    criterion = DistillationCriterion(chunk_size=8)
    student = case.student(case.student_hidden)
    teacher = case.teacher(case.teacher_hidden).detach()
    if soft_cap is not None:
        student, teacher = (soft_cap * torch.tanh(logits / soft_cap) for logits in (student, teacher))
    expected = criterion(student, teacher, case.labels)
    trainable = [tensor for tensor in case.inputs if tensor.requires_grad]
    gradients = torch.autograd.grad(expected.loss, trainable)
    output = case.run(criterion, soft_cap=soft_cap)
    assert torch.allclose(output.loss, expected.loss)
    assert case.student.base.weight.grad is None  # type: ignore[union-attr]
    for tensor, gradient in zip(trainable, gradients, strict=True):
        assert (tensor.grad - gradient).norm() <= 1e-5 * gradient.norm()


def test_a_hooked_head_is_called() -> None:
    case = Case(vocab=700)
    expected = case.run(DistillationCriterion(chunk_size=8)).loss
    case.student.register_forward_hook(lambda module, inputs, logits: 2 * logits)
    assert not torch.allclose(case.run(DistillationCriterion(chunk_size=8)).loss, expected)


# --------------------------------------------------------------------------------------------------------------------
# Masked logits


def test_masked_logits_give_what_the_formulas_give() -> None:
    student, teacher = (torch.randn(6, 50, dtype=torch.float64) for _ in range(2))
    student[0, 7] = teacher[0, 7] = -torch.inf  # on both sides
    student[1, 7] = -torch.inf  # FKL is infinite
    teacher[2, 7] = -torch.inf  # RKL is infinite
    labels = torch.zeros(6, dtype=torch.long)
    for name, divergence in DIVERGENCES.items():
        leaf, twin = student.clone().requires_grad_(), student.clone().requires_grad_()
        output = DistillationCriterion(divergence, alpha=1.0, chunk_size=4)(leaf, teacher, labels)
        output.loss.backward()
        expected = divergence(twin, teacher)
        expected.sum().backward()
        assert torch.allclose(output.statistics["divergence"], expected), name
        assert leaf.grad.isfinite().all(), name
        assert torch.allclose(leaf.grad, twin.grad, atol=1e-12), name
    assert output.statistics["fkl"].isinf().tolist() == [False, True, False, False, False, False]
    assert output.statistics["rkl"].isinf().tolist() == [False, False, True, False, False, False]
    assert torch.allclose(output.statistics["fkl"], F.forward_kl(student, teacher))


# --------------------------------------------------------------------------------------------------------------------
# Precision


@pytest.mark.parametrize("kind", ["bfloat16", "autocast bfloat16", "autocast float16"])
def test_lower_precision(kind: str) -> None:
    """Logits are not rounded below float32: autograd, which rounds those of 40 by 0.1, is off by percents."""
    dtype = torch.float16 if kind == "autocast float16" else torch.bfloat16
    case = Case(dtype=torch.bfloat16 if kind == "bfloat16" else torch.float32)
    dense = Dense(case, "AdaptiveKL", 0.4, 1.0, 0.5, "cover")
    criterion = DistillationCriterion(alpha=0.4, chunk_size=8)

    def errors() -> list[float]:
        assert all(tensor.grad.dtype == tensor.dtype for tensor in case.inputs)
        pairs = zip(case.gradients, dense.gradients, strict=True)
        return [((ours.double() - expected).norm() / expected.norm()).item() for ours, expected in pairs]

    with torch.autocast("cpu", dtype, enabled="autocast" in kind):
        output = case.run(criterion)
        ours = errors()
        for tensor in case.inputs:
            tensor.grad = None
        logits, teacher_logits = case.student(case.student_hidden), case.teacher(case.teacher_hidden).detach()
        criterion(logits, teacher_logits, case.labels).loss.backward()
    assert logits.dtype == dtype and output.loss.dtype == torch.float32
    assert output.loss.item() == pytest.approx(dense.statistics["loss"].sum().item(), rel=1e-3)
    for mine, autograd in zip(ours, errors(), strict=True):
        assert mine <= 0.005 and mine <= 1.1 * autograd < 0.05


@pytest.mark.parametrize("noise", [0.05, 0.3, 1.0])
@pytest.mark.parametrize("soft_cap", [None, 20.0])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_student_near_its_teacher_in_half_precision(dtype: torch.dtype, soft_cap: float | None, noise: float) -> None:
    """The nearer, the more of the difference a rounded logit would hide."""
    case = Case(tokens=64, vocab=3000, dtype=dtype, bias=True)
    hidden = 2 * torch.randn(64, HIDDEN)
    case.student, case.teacher_hidden = head(case.student.weight, case.student.bias, dtype), hidden.to(dtype)
    case.teacher = case.student
    case.student_hidden = (hidden + noise * torch.randn(64, HIDDEN)).to(dtype).requires_grad_()
    output = case.run(DistillationCriterion(alpha=1.0, chunk_size=24), soft_cap=soft_cap)
    dense = Dense(case, "AdaptiveKL", 1.0, 1.0, 0.5, "cover", soft_cap=soft_cap)
    assert output.loss.item() == pytest.approx(dense.statistics["loss"].sum().item(), rel=1e-4)
    for ours, expected in zip(case.gradients, dense.gradients, strict=True):
        assert ours.dtype == dtype
        assert (ours.double() - expected).norm() <= 0.005 * expected.norm()


def test_small_gradients_survive_float16() -> None:
    """Each of 700 tokens gets a gradient of 1e-8 or so, which float16 rounds to nothing."""
    case = Case(vocab=700)
    with torch.no_grad():
        case.student_hidden.mul_(1e-3)
        case.teacher_hidden.mul_(1e-3)
    dense = Dense(case, "ForwardKL", 1.0, 1.0, 0.5, "cover")
    with torch.autocast("cpu", torch.float16):
        case.run(DistillationCriterion(ForwardKL(), 1.0))
    for ours, expected in zip(case.gradients, dense.gradients, strict=True):
        assert (ours.double() - expected).norm() <= 3e-2 * expected.norm()


def test_a_loss_scale_comes_in_before_gradients_lose_precision() -> None:
    case = Case(vocab=700)
    dense = Dense(case, "AdaptiveKL", 0.5, 1.0, 0.5, "cover")
    output = case.run(DistillationCriterion(chunk_size=8), scale=65536.0)
    check(case, output, dense, scale=65536.0)


# --------------------------------------------------------------------------------------------------------------------
# What it costs


class Largest(TorchDispatchMode):
    """The most elements that any tensor had."""

    elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, tuple | list) else (result,):
            if isinstance(tensor, Tensor):
                self.elements = max(self.elements, tensor.numel())
        return result


@pytest.mark.parametrize("name", ["AdaptiveKL", "Hellinger"])
def test_no_tensor_of_all_logits_exists(name: str) -> None:
    tokens, vocab = 4 * HIDDEN, 2000  # so that the head's weight is smaller than half of the logits
    case = Case(tokens, vocab)
    with Largest() as largest:
        case.run(DistillationCriterion(DIVERGENCES[name], chunk_size=8))
    assert largest.elements <= 2 * HIDDEN * vocab < tokens * vocab
    with Largest() as largest:
        case.run(DistillationCriterion(DIVERGENCES[name], chunk_size=tokens))
    assert largest.elements >= tokens * vocab, "the watch would notice"


def test_the_default_chunk_is_bounded_in_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = []
    real = sides.LinearHead.prepare

    def prepare(self: Any, *arguments: Any) -> None:
        real(self, *arguments)
        sizes.append(self.logits.nbytes)

    monkeypatch.setattr(sides.LinearHead, "prepare", prepare)
    case = Case(tokens=8000, vocab=2500)
    case.run(DistillationCriterion())
    assert sizes and all(2**25 < size <= 2**26 for size in sizes)


def test_without_gradients_none_are_computed() -> None:
    case = Case(vocab=700)
    expected = case.run(DistillationCriterion(chunk_size=8))
    for tensor in case.inputs:
        tensor.grad = None
    with torch.no_grad():
        student = Projection(case.student_hidden, case.student)
        teacher = Projection(case.teacher_hidden, case.teacher)
        output = DistillationCriterion(chunk_size=8)(student, teacher, case.labels)
    assert torch.equal(output.loss, expected.loss) and not output.loss.requires_grad
    assert all(tensor.grad is None for tensor in case.inputs)


def test_frozen_inputs_get_no_gradient() -> None:
    case = Case(vocab=700)
    case.run(DistillationCriterion())
    expected = case.gradients[0].clone()
    case.student.weight.requires_grad_(False)
    case.run(DistillationCriterion())
    assert torch.equal(case.gradients[0], expected) and case.student.weight.grad is None


def test_no_tokens() -> None:
    case = Case(tokens=0, vocab=700)
    output = case.run(DistillationCriterion())
    assert output.loss == 0
    assert all(values.shape == (0,) for values in output.statistics.values())
    assert case.gradients[0].shape == (0, HIDDEN) and not case.gradients[1].any()


def test_a_second_backward_pass_is_an_error_not_a_wrong_gradient() -> None:
    case = Case(vocab=700)
    student = Projection(case.student_hidden, case.student)
    loss = DistillationCriterion()(student, Projection(case.teacher_hidden, case.teacher), case.labels).loss
    (2 * loss).backward(retain_graph=True)
    with pytest.raises(RuntimeError):
        (2 * loss).backward()


def test_logits_may_all_be_far_from_zero() -> None:
    """GPT-2's are around -100: a distribution does not change with a shift, and rounding should not either."""
    student = torch.randn(20, 3000)
    teacher = student + 0.3 * torch.randn(20, 3000)
    labels = torch.arange(20)
    expected = F.forward_kl(student.double(), teacher.double())
    for shift in (0.0, -128.0, 256.0):  # exact in float32, but for what it takes from the logits' last digits
        shifted = [(logits + shift, (logits + shift).double()) for logits in (student, teacher)]
        expected = F.forward_kl(shifted[0][1], shifted[1][1])
        ours = DistillationCriterion()(shifted[0][0], shifted[1][0], labels).statistics["fkl"].double()
        assert ((ours - expected).abs() <= 1e-5 * expected + 1e-6).all(), shift


def test_the_vocabulary_is_never_sorted() -> None:
    sorted_: list[int] = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            name = func.overloadpacket.__name__
            if name in ("sort", "argsort", "topk"):
                sorted_.append(args[0].shape[-1])
            return func(*args, **(kwargs or {}))

    with Watch():
        Case().run(DistillationCriterion(AdaptiveKL(0.05)))
        Case().run(DistillationCriterion(AdaptiveKL(1.0)))
    assert sorted_ and max(sorted_) < VOCAB / 2


def test_float16_neither_stumbles_over_nothing_nor_overflows() -> None:
    with torch.autocast("cpu", torch.float16):
        assert Case(tokens=0, vocab=700).run(DistillationCriterion()).loss == 0
        case = Case(tokens=400, vocab=700)
        with torch.no_grad():
            case.student_hidden[:, 0] = 1000.0  # an outlier channel, as large models have them
            case.student.weight[:, 0] *= 1e-3
        case.run(DistillationCriterion())
    assert all(gradient.isfinite().all() for gradient in case.gradients)


def test_a_divergence_with_parameters_of_its_own_is_refused() -> None:
    class Learned(Hellinger):
        def __init__(self) -> None:
            super().__init__()
            self.scale = nn.Parameter(torch.ones(()))

    with pytest.raises(UsageError, match="Learned has trainable parameters, which get no gradient"):
        DistillationCriterion(Learned())


@pytest.mark.parametrize("name", DIVERGENCES)
def test_in_inference_mode_as_lightning_validates(name: str) -> None:
    case = Case(vocab=700)
    criterion = DistillationCriterion(DIVERGENCES[name], chunk_size=8)
    expected = case.run(criterion)
    with torch.inference_mode():
        student = Projection(case.student_hidden, case.student)
        output = criterion(student, Projection(case.teacher_hidden, case.teacher), case.labels)
        assert torch.allclose(output.loss, expected.loss)
        masked = case.teacher(case.teacher_hidden)
        masked[:, 5] = -torch.inf
        assert criterion(case.student(case.student_hidden), masked, case.labels).statistics["rkl"].isinf().all()


@pytest.mark.parametrize("chunk_size", [0, -1])
def test_bad_chunk_size(chunk_size: int) -> None:
    with pytest.raises(UsageError, match="chunk_size must be 1 or more"):
        DistillationCriterion(chunk_size=chunk_size)


# --------------------------------------------------------------------------------------------------------------------
# What only a GPU has, as far as a CPU can tell


def round_up(vocab: int, device: torch.device) -> int:
    return columns_for(vocab, torch.device("cuda"))


@pytest.mark.parametrize("soft_cap", [None, 5.0])
@pytest.mark.parametrize("wider", [0, 20, 64])
def test_padded_heads_give_what_plain_ones_give(
    monkeypatch: pytest.MonkeyPatch, soft_cap: float | None, wider: int
) -> None:
    case = Case(vocab=701, bias=True)
    if wider:  # so that rows behind the common vocabulary are at hand
        case.teacher = head(torch.randn(701 + wider, 2 * HIDDEN), torch.randn(701 + wider), torch.float32)
    criterion = DistillationCriterion(chunk_size=8)
    plain = case.run(criterion, soft_cap=soft_cap)
    expected = [gradient.clone() for gradient in case.gradients]
    monkeypatch.setattr(sides, "columns_for", round_up)
    output = case.run(criterion, soft_cap=soft_cap)
    for name, values in plain.statistics.items():
        assert torch.allclose(output.statistics[name], values, rtol=1e-5, atol=1e-6), name
    for tensor, before in zip(case.inputs, expected, strict=True):
        assert tensor.grad.shape == tensor.shape
        assert (tensor.grad - before).norm() <= 1e-5 * before.norm()
    nothing = torch.zeros(TOKENS, 1)
    stored = TopLogProbs(nothing - 1, nothing.long(), nothing - 0.5, 800)
    assert criterion(Projection(case.student_hidden, case.student), stored, case.labels).loss.isfinite()


def test_heads_are_copied_only_where_their_size_or_precision_asks_for_it() -> None:
    weight = torch.randn(128, 4)
    assert resized(weight, 128).data_ptr() == resized(weight, 64).data_ptr() == weight.data_ptr()
    wider = resized(weight, 192)
    assert wider.shape == (192, 4) and torch.equal(wider[:128], weight) and not wider[128:].any()
    assert [columns_for(vocab, torch.device("cuda")) for vocab in (1, 64, 50257)] == [64, 64, 50304]
    assert columns_for(50257, torch.device("cpu")) == 50257
    side = sides.LinearHead(Projection(torch.randn(3, 4), head(weight, None, torch.float32)), nn.Linear(4, 128))
    side.prepare(3, 128, torch.float32)
    assert side.weight.data_ptr() == side.inputs[1].data_ptr()


def test_chunks_that_suit_a_gpu() -> None:
    for vocab, count, most in ((50257, 2, 2048), (151936, 2, 2048), (262144, 2, 1300), (262144, 1, 2048)):
        rows = projection._rows(vocab, torch.float32, torch.device("cuda"), count)
        assert most / 1.1 <= rows <= most, (vocab, rows)
        assert rows * vocab * (4 * count + 2) <= 3.3e9


def test_nothing_in_the_walk_waits_for_the_device() -> None:
    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            name = func.overloadpacket.__name__
            assert name not in ("nonzero", "_local_scalar_dense", "is_nonzero", "masked_select", "item", "equal"), name
            assert name != "index" or all(index is None or index.dtype != torch.bool for index in args[1])
            return func(*args, **(kwargs or {}))

    def compare(student: Tensor, teacher: Any, labels: Tensor, gradient: Any) -> dict[str, Tensor]:
        loss = (student - teacher).square().sum(-1)
        torch.sub(student, teacher, out=gradient)
        return {"loss": loss}

    case = Case(vocab=70)
    logits, log_probs = torch.randn(TOKENS, 70), torch.randn(TOKENS, 3)
    top = TopLogProbs(log_probs, torch.randint(0, 80, (TOKENS, 3)), torch.zeros(TOKENS, 1), 80)
    adapted = Projection(case.student_hidden, Adapted(case.student))
    for teacher in (Projection(case.teacher_hidden, case.teacher), logits, logits.half(), top):
        for student in (Projection(case.student_hidden, case.student, 5.0), adapted, logits.clone().requires_grad_()):
            with Watch():
                project_and_compare(student, teacher, case.labels, compare, 10)


def test_out_of_memory_names_the_remedy() -> None:
    def compare(*_: Any, gradient: Any) -> dict[str, Tensor]:
        raise torch.OutOfMemoryError("CUDA out of memory")

    with pytest.raises(torch.OutOfMemoryError, match="CUDA out of memory") as caught:
        project_and_compare(torch.zeros(9, 3), None, torch.zeros(9), compare, 5)
    (note,) = caught.value.__notes__
    assert note == "The logits of 5 tokens existed at a time: a smaller criterion.chunk_size takes less."


@pytest.mark.parametrize("allowed", ["highest", "high"])
def test_no_tf32_in_float32_products(allowed: str) -> None:
    settings = torch.backends.cuda.matmul
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(allowed)
    try:
        state = settings.fp32_precision
        for device, dtype, inside in (("cuda", torch.float32, "ieee"), ("cuda", torch.float64, state)):
            with without_tf32(SimpleNamespace(is_cuda=device == "cuda", dtype=dtype)):  # type: ignore[arg-type]
                assert settings.fp32_precision == inside
            assert settings.fp32_precision == state and torch.get_float32_matmul_precision() == allowed
    finally:
        torch.set_float32_matmul_precision(before)


def test_no_tf32_where_torch_knows_the_old_name_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    settings = SimpleNamespace(allow_tf32=True)
    monkeypatch.setattr(torch.backends.cuda, "matmul", settings)
    with without_tf32(SimpleNamespace(is_cuda=True, dtype=torch.float32)):  # type: ignore[arg-type]
        assert settings.allow_tf32 is False
    assert settings.allow_tf32 is True


def test_the_criterion_is_a_few_frames_from_the_comparison(monkeypatch: pytest.MonkeyPatch) -> None:
    frames: list[str] = []
    real = reference.compare

    def compare(*arguments: Any) -> dict[str, Tensor]:
        frames[:] = [frame.name for frame in traceback.extract_stack()[:-1] if "/akl_lightning/" in frame.filename]
        return real(*arguments)

    monkeypatch.setattr(reference, "compare", compare)
    Case(vocab=70).run(DistillationCriterion())
    assert len(frames) <= 5, frames
