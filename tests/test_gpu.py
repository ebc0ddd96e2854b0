"""On a GPU: as exact as on a CPU, the same bits again, and no code of ours waits for it."""

import copy
import os
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from traceback import walk_stack
from typing import Any
from unittest import mock

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer, seed_everything
from lightning.pytorch.plugins.precision import FSDPPrecision, MixedPrecision
from torch import Tensor, nn
from torch.distributed.fsdp.sharded_grad_scaler import ShardedGradScaler
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

import akl_lightning
from akl_lightning.callbacks import LastCheckpoint
from akl_lightning.criterion import CriterionOutput, DistillationCriterion
from akl_lightning.data.module import InstructionDataModule
from akl_lightning.divergences import SkewKL
from akl_lightning.kernels.classes import Classes
from akl_lightning.module import DistillationModule
from akl_lightning.projection import Merged, Projection, TopLogProbs
from tests.conftest import QUIET, gpt2, write
from tests.test_projection import DIVERGENCES, Adapted, Case, Dense, head

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")]

DEVICE = torch.device("cuda")
# What a Trainer sets for a run that is to be repeatable, which cuBLAS reads but once.
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")


def clean_up() -> None:
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
    torch.use_deterministic_algorithms(False)
    torch.cuda.set_sync_debug_mode("default")
    torch.set_float32_matmul_precision("highest")


@pytest.fixture(autouse=True)
def as_it_was() -> Iterator[None]:
    """What a Trainer leaves behind (a process group, modes, names of ranks) ends with the test."""
    clean_up()  # other files' tests, too
    with mock.patch.dict(os.environ):
        yield
        clean_up()


# --------------------------------------------------------------------------------------------------------------------
# The criterion

VOCAB = 5003  # no multiple of anything

EVERY = {**DIVERGENCES, "SkewKL reverse": SkewKL(0.3, reverse=True)}
HALF = (torch.bfloat16, torch.float16)


def moved(case: Case, device: torch.device, dtype: torch.dtype | None = None) -> Case:
    """The same numbers elsewhere."""
    there = copy.deepcopy(case)
    there.labels = case.labels.to(device)
    there.student, there.teacher = there.student.to(device, dtype), there.teacher.to(device, dtype)
    there.student_hidden = case.student_hidden.detach().to(device, dtype).requires_grad_()
    there.teacher_hidden = case.teacher_hidden.to(device, dtype)
    return there


def without_doubt(case: Case, temperature: float = 1.0, soft_cap: float | None = None, **_: Any) -> Case:
    """The same without the tokens of which rounding may decide what their head is."""
    weights = [parameter.detach().double() for parameter in case.teacher.parameters()]
    logits = nn.functional.linear(case.teacher_hidden.double(), *weights)
    if soft_cap is not None:
        logits = soft_cap * torch.tanh(logits / soft_cap)
    ordered = (logits / temperature).softmax(-1).sort(descending=True).values
    mass = ordered.cumsum(-1)
    crossing, place = (mass < 0.5).sum(-1, keepdim=True), torch.arange(1, mass.shape[1])
    ties = (ordered[:, :-1] < ordered[:, 1:] * (1 + 1e-5)) & ((place == crossing) | (place == crossing + 1))
    sure = ((mass - 0.5).abs() > 2e-5).all(-1) & ~ties.any(-1)
    assert sure.sum() >= 0.8 * len(sure)
    case.labels, case.teacher_hidden = case.labels[sure], case.teacher_hidden[sure]
    case.student_hidden = case.student_hidden.detach()[sure].requires_grad_()
    return case


def close(ours: CriterionOutput, gradients: list[Tensor], dense: Any, right: list[Tensor], half: bool) -> None:
    relative, absolute, of_gradient = (1e-4, 1e-5, 5e-3) if half else (1e-5, 1e-6, 1e-5)
    assert ours.statistics.keys() == dense.statistics.keys()
    for name, expected in dense.statistics.items():
        values, expected = ours.statistics[name].cpu().double(), expected.detach()
        assert ((values - expected).abs() <= relative * expected.abs() + absolute).all(), name
    assert ours.loss.item() == pytest.approx(dense.statistics["loss"].sum().item(), rel=relative)
    for mine, expected in zip(gradients, right, strict=True):
        assert (mine.cpu().double() - expected).norm() <= of_gradient * expected.norm()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", DIVERGENCES)
def test_as_exact_as_promised_though_tf32_is_allowed(name: str, dtype: torch.dtype) -> None:
    torch.set_float32_matmul_precision("high")
    case = without_doubt(Case(vocab=VOCAB, dtype=dtype))
    dense = Dense(case, name, 0.4, 1.0, 0.5, "cover")
    there = moved(case, DEVICE)
    output = there.run(DistillationCriterion(DIVERGENCES[name], 0.4))
    assert all(gradient.dtype == dtype for gradient in there.gradients)
    close(output, there.gradients, dense, dense.gradients, dtype in HALF)
    assert torch.get_float32_matmul_precision() == "high"


Run = Callable[[], tuple[CriterionOutput, list[Tensor]]]


def projected(
    case: Case, name: str = "AdaptiveKL", alpha: float = 0.4, temperature: float = 1.0, chunk_size: int | None = None,
    scale: float = 1.0, autocast: torch.dtype | None = None, **options: Any,
) -> Run:  # fmt: skip
    criterion = DistillationCriterion(EVERY[name], alpha, temperature, chunk_size=chunk_size)
    device, lower = case.labels.device.type, case.student_hidden.dtype == torch.float32 and autocast is not None

    def run() -> tuple[CriterionOutput, list[Tensor]]:
        with torch.autocast(device, autocast or torch.bfloat16, lower):
            output = case.run(criterion, scale, **options)
        return output, [tensor.grad / scale for tensor in case.inputs if tensor.grad is not None]

    return run


def against(make_teacher: Callable[[Case], Any], case: Case, alpha: float = 0.4) -> Run:
    """Hidden states of the student against another kind of teacher."""
    criterion, teacher = DistillationCriterion(alpha=alpha), make_teacher(case)

    def run() -> tuple[CriterionOutput, list[Tensor]]:
        case.student_hidden.grad = case.student.weight.grad = None
        output = criterion(Projection(case.student_hidden, case.student), teacher, case.labels)
        output.loss.backward()
        return output, case.gradients

    return run


def top_of_the_teacher(case: Case) -> TopLogProbs:
    # Its head, turned over, is as good as any logits. Made on the CPU, so that equals are chosen among alike.
    log_probs, tokens = (8 * case.teacher.weight.detach().T[: len(case.labels)].cpu().double()).log_softmax(-1).topk(16)
    rest = (-log_probs.exp().sum(-1, keepdim=True)).log1p()
    dtype = torch.promote_types(case.teacher_hidden.dtype, torch.float32)
    log_probs, tokens, rest = (x.to(case.labels.device) for x in (log_probs.to(dtype), tokens, rest.to(dtype)))
    return TopLogProbs(log_probs, tokens, rest, VOCAB)


def ready_made(case: Case) -> Run:
    criterion, weight = DistillationCriterion(), case.student.weight
    teacher = 8 * case.teacher.weight.detach().T[: weight.shape[1]]

    def run() -> tuple[CriterionOutput, list[Tensor]]:
        weight.grad = None
        output = criterion(8 * weight.T, teacher, case.labels[: weight.shape[1]])
        output.loss.backward()
        return output, [weight.grad]

    return run


def padded(case: Case) -> Run:
    """The teacher's head has more outputs than the student's."""
    weight = case.teacher.weight.detach()
    extra = torch.ones(20, weight.shape[1], device=weight.device, dtype=weight.dtype)
    case.teacher = head(torch.cat([weight, extra]), None, weight.dtype).to(weight.device)
    return projected(case)


def adapted(case: Case) -> Run:
    torch.manual_seed(4)
    rank = Adapted(copy.deepcopy(case.student).cpu())
    case.student = rank.to(case.labels.device, case.student_hidden.dtype)  # type: ignore[assignment]
    return projected(case)


def in_classes(
    case: Case, name: str = "AdaptiveKL", temperature: float = 1.0, chunk_size: int | None = None,
    weights: bool = False, **options: Any,
) -> Run:  # fmt: skip
    """A teacher over another vocabulary; one class has many outputs, one has none on one side."""
    generator = torch.Generator().manual_seed(0)
    count, most = VOCAB - 1500, VOCAB - 500
    maps = [torch.cat([torch.arange(count), torch.full((most - count,), 7)]) for _ in range(2)]
    maps = [torch.cat([of, torch.randint(0, 200, (VOCAB - most,), generator=generator)]) for of in maps]
    maps = [of[torch.randperm(VOCAB, generator=generator)] for of in maps]
    maps[1][maps[1] == 5] = 6
    device = case.labels.device
    classes = Classes(maps[0], maps[1], count).to(device)
    criterion = DistillationCriterion(EVERY[name], 0.4, temperature, chunk_size=chunk_size)
    each = torch.linspace(0, 1, len(case.labels)).to(device) if weights else None

    def run() -> tuple[CriterionOutput, list[Tensor]]:
        for tensor in case.inputs:
            tensor.grad = None
        student = Projection(case.student_hidden, case.student, **options)
        there = Merged(Projection(case.teacher_hidden, case.teacher, **options), classes)
        output = criterion(student, there, case.labels, each)
        output.loss.backward()
        return output, [tensor.grad for tensor in case.inputs if tensor.grad is not None]

    return run


def adapted_in_classes(case: Case) -> Run:
    adapted(case)
    return in_classes(case)


def weighed(case: Case) -> Run:
    """A weight of its own for each token."""
    weights = torch.linspace(0, 1, len(case.labels)).to(case.labels.device)

    def run() -> tuple[CriterionOutput, list[Tensor]]:
        for tensor in case.inputs:
            tensor.grad = None
        student, teacher = Projection(case.student_hidden, case.student), Projection(case.teacher_hidden, case.teacher)
        output = DistillationCriterion()(student, teacher, case.labels, weights)
        output.loss.backward()
        return output, [tensor.grad for tensor in case.inputs if tensor.grad is not None]

    return run


def without_a_gradient(case: Case) -> Run:
    student, teacher = Projection(case.student_hidden, case.student), Projection(case.teacher_hidden, case.teacher)

    def run() -> tuple[CriterionOutput, list[Tensor]]:
        with torch.no_grad():
            return DistillationCriterion()(student, teacher, case.labels), []

    return run


BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
KINDS: dict[str, tuple[torch.dtype, Callable[[Case], Run]]] = {
    **{f"{name}, bfloat16": (BF16, partial(projected, name=name)) for name in EVERY},
    **{f"{name}, float32": (FP32, partial(projected, name=name)) for name in EVERY},
    "softened": (BF16, partial(projected, temperature=2.0)),
    "softened, a user's own": (FP32, partial(projected, name="Hellinger", temperature=2.0)),
    "soft cap, bfloat16": (BF16, partial(projected, soft_cap=5.0)),
    "soft cap, float32": (FP32, partial(projected, soft_cap=5.0)),
    "chunks": (BF16, partial(projected, chunk_size=8)),
    "one token at a time": (FP32, partial(projected, chunk_size=1)),
    "float16": (FP16, partial(projected, scale=2.0**6)),
    "autocast, bfloat16": (BF16, partial(projected, autocast=BF16)),
    "autocast, float16": (FP16, partial(projected, autocast=FP16, scale=2.0**16)),
    "module head": (FP32, adapted),
    "padded": (BF16, padded),
    "logits, bfloat16": (BF16, ready_made),
    "logits, float32": (FP32, ready_made),
    "top log-probabilities": (BF16, partial(against, top_of_the_teacher)),
    "no teacher, bfloat16": (BF16, partial(against, lambda case: None, alpha=0.0)),
    "no teacher, float32": (FP32, partial(against, lambda case: None, alpha=0.0)),
    "no gradient": (BF16, without_a_gradient),
    "a weight a token, bfloat16": (BF16, weighed),
    "a weight a token, float32": (FP32, weighed),
    **{f"classes, {name}, float32": (FP32, partial(in_classes, name=name)) for name in EVERY},
    "classes, bfloat16": (BF16, in_classes),
    "classes, float16": (FP16, in_classes),
    "classes, soft cap": (BF16, partial(in_classes, soft_cap=5.0)),
    "classes, softened, bfloat16": (BF16, partial(in_classes, temperature=2.0)),
    "classes, softened, float32": (FP32, partial(in_classes, temperature=2.0)),
    "classes, chunks": (BF16, partial(in_classes, chunk_size=8)),
    "classes, module head": (FP32, adapted_in_classes),
    "classes, a weight a token": (BF16, partial(in_classes, weights=True)),
}


def on_both(kind: str) -> tuple[Run, Run]:
    """On the GPU, and in float64 on the CPU from the same numbers."""
    dtype, make = KINDS[kind]
    case = Case(vocab=VOCAB, dtype=dtype, bias=kind.startswith(("soft cap", "autocast")))
    case = without_doubt(case, **getattr(make, "keywords", {}))
    stored = FP32 if kind.startswith("autocast") else dtype
    return make(moved(case, DEVICE, stored)), make(moved(case, torch.device("cpu"), torch.float64))


@pytest.mark.parametrize("kind", KINDS)
def test_as_on_a_cpu_in_float64(kind: str) -> None:
    ours, right = (run() for run in on_both(kind))
    close(*ours, *right, half=KINDS[kind][0] in HALF)  # type: ignore[arg-type]


@pytest.mark.parametrize("kind", KINDS)
def test_never_waits_and_gives_the_same_bits_again(kind: str) -> None:
    run, _ = on_both(kind)

    def bits() -> list[Tensor]:
        output, gradients = run()
        return [output.loss.detach(), *output.statistics.values(), *(gradient.clone() for gradient in gradients)]

    first = bits()  # compiles the kernel
    torch.cuda.set_sync_debug_mode("error")
    second = bits()
    torch.cuda.set_sync_debug_mode("default")
    torch.use_deterministic_algorithms(True)  # what nobody has filled is NaN now
    third, fourth = bits(), bits()
    for a, b, c, d in zip(first, second, third, fourth, strict=True):
        assert torch.equal(a, b) and torch.equal(c, d)
        assert (a.double() - c.double()).norm() <= 1e-3 * a.double().norm()


# --------------------------------------------------------------------------------------------------------------------
# Training steps

ACCELERATOR = "gpu"
Found = dict[str, Tensor]


def llama() -> LlamaForCausalLM:
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=300, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2,
            num_key_value_heads=1, max_position_embeddings=64, bos_token_id=0, eos_token_id=0,
        )
    )  # fmt: skip


STUDENTS: dict[str, Callable[[], nn.Module]] = {"gpt2": partial(gpt2, layers=2), "llama": llama}


def weights(trainer: Trainer) -> Found:
    return {name: value.cpu().double() for name, value in trainer.strategy.lightning_module_state_dict().items()}


def train(
    data: InstructionDataModule, student: str = "gpt2", teacher: str | None = None, module: Any = None, **settings: Any
) -> tuple[Found, Found]:
    """What three steps of plain gradient descent change, and what they log."""
    torch.manual_seed(3)
    optimizer = partial(torch.optim.SGD, lr=0.05)
    module_ = DistillationModule(STUDENTS[student](), teacher or gpt2(24), optimizer=optimizer, **(module or {}))
    before = {name: value.detach().cpu().double() for name, value in module_.state_dict().items()}
    limits = {"max_epochs": 1, "limit_train_batches": 3, "limit_val_batches": 1, "num_sanity_val_steps": 0}
    trainer = Trainer(**{**QUIET, "accelerator": ACCELERATOR, "devices": 1, **limits, **settings})
    trainer.fit(module_, data)
    after = weights(trainer)
    if settings.get("precision") == "bf16-true":
        before = {name: value.bfloat16().double() for name, value in before.items()}
    logged = {name: value.cpu().double() for name, value in trainer.callback_metrics.items()}
    return {name: after[name] - before[name] for name in before}, logged


def apart(ours: Found, theirs: Found) -> float:
    assert ours.keys() == theirs.keys()
    difference = torch.cat([(ours[name] - theirs[name]).flatten() for name in theirs])
    return float(difference.norm() / torch.cat([value.flatten() for value in theirs.values()]).norm())


ON_A_CPU: dict[str, tuple[Found, Found]] = {}


def on_a_cpu(data: InstructionDataModule, **settings: Any) -> tuple[Found, Found]:
    """The same in float32 on a CPU, once for all tests."""
    key = repr(settings)
    if key not in ON_A_CPU:
        ON_A_CPU[key] = train(data, **settings, accelerator="cpu")
    return ON_A_CPU[key]


def in_precision(precision: str, strategy: str = "auto") -> dict[str, Any]:
    """As by the Trainer's flag, but that float16 begins with a scale that does not overflow at first."""
    if precision != "16-mixed":
        return {"precision": precision, "strategy": strategy}
    plugin: Any
    if strategy == "fsdp":
        plugin = FSDPPrecision("16-mixed")
        plugin.scaler = ShardedGradScaler(init_scale=64.0)
    else:
        plugin = MixedPrecision("16-mixed", DEVICE.type, torch.amp.GradScaler(DEVICE.type, init_scale=64.0))
    return {"plugins": [plugin], "strategy": strategy}


def agree(
    ours: tuple[Found, Found], theirs: tuple[Found, Found], precision: str = "32-true", loose: bool = False
) -> None:
    # Weights in bfloat16 round away most of a small step; the bound of the others is that of their products.
    of_update, of_metric = {"32-true": (5e-5, 1e-4), "bf16-true": (0.2, 0.03)}.get(precision, (0.02, 0.03))
    assert apart(ours[0], theirs[0]) <= of_update
    assert ours[1].keys() == theirs[1].keys()
    for name, value in theirs[1].items():
        # A share of some fifty tokens, each of which may turn over.
        absolute = 0.1 if name.endswith("agreement") and (precision != "32-true" or loose) else of_metric
        assert ours[1][name].item() == pytest.approx(value.item(), rel=of_metric, abs=absolute), name


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed", "bf16-true", "16-mixed"])
@pytest.mark.parametrize("strategy", ["auto", "ddp", "fsdp2", "fsdp"])
def test_steps_in_every_precision_and_strategy(data: InstructionDataModule, strategy: str, precision: str) -> None:
    theirs = on_a_cpu(data)
    agree(train(data, **in_precision(precision, strategy)), theirs, precision)


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_a_student_of_another_family(data: InstructionDataModule, precision: str) -> None:
    theirs = on_a_cpu(data, student="llama")
    agree(train(data, student="llama", **in_precision(precision)), theirs, precision)


@pytest.mark.parametrize("strategy", ["auto", "fsdp2", "fsdp"])
def test_clipped_accumulated_packed_and_checkpointed_steps(data: InstructionDataModule, strategy: str) -> None:
    settings: dict[str, Any] = {"gradient_clip_val": 0.3, "accumulate_grad_batches": 2}
    theirs = on_a_cpu(data, **settings)
    module = {"packing": True, "activation_checkpointing": True}
    agree(train(data, module=module, strategy=strategy, deterministic=True, **settings), theirs)


@pytest.mark.parametrize("codec", ["bfloat16", None], ids=["hidden states", "top log-probabilities"])
def test_steps_from_a_cached_teacher(data: InstructionDataModule, tmp_path: Path, codec: str | None) -> None:
    kind: dict[str, Any] = {"top_k": 20} if codec is None else {"codec": codec}
    teacher = write(gpt2(24), tmp_path / "cache", data, **kind)
    theirs = train(data, teacher=teacher, accelerator="cpu")
    # In float16 several tokens are the likeliest, and which of them is looked at is nobody's business.
    agree(train(data, teacher=teacher), theirs, loose=codec is None)
    agree(train(data, teacher=teacher, deterministic=True, precision="bf16-mixed"), theirs, "bf16-mixed")


# --------------------------------------------------------------------------------------------------------------------
# Who waits in a step

THEIRS = (
    "transformers/masking_utils.py",  # whether a mask masks anything
    "torch/amp/grad_scaler.py",  # whether float16 has overflowed
    "torch/nn/parallel/distributed.py",  # DDP's buckets, in the second step
    "lightning/fabric/utilities/apply_func.py",  # what a progress bar would show, every log_every_n_steps
)
"""Where a step waits in code of others."""

_WRAPPERS = ("warnings.py", "torch/_tensor.py", "torch/functional.py", "torch/nn/functional.py", "torch/_ops.py")


def place() -> str:
    """The innermost line that is none of ``warnings`` and no mere wrapper of torch."""
    for frame, line in walk_stack(None):
        file = frame.f_code.co_filename
        if frame.f_code is not place.__code__ and frame.f_code.co_name != "note" and not file.endswith(_WRAPPERS):
            return f"{file}:{line}"
    raise AssertionError


@contextmanager
def waits() -> Iterator[list[str]]:
    """Which lines have the host wait for the GPU while torch's mode is ``warn``."""
    places: list[str] = []

    def note(message: Any, *_: Any, **__: Any) -> None:
        if "called a synchronizing" in str(message):
            places.append(place())

    with warnings.catch_warnings():
        warnings.simplefilter("always")
        warnings.showwarning = note
        yield places


class Watch(Callback):
    """From the end of the first step to that of the third, with one line that does wait."""

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        torch.cuda.set_sync_debug_mode("warn" if trainer.global_step < 3 else "default")

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        if trainer.global_step == 1:
            torch.ones((), device=pl_module.device).item()


@pytest.mark.parametrize(
    ("module", "settings"),
    [
        ({}, {"precision": "32-true"}),
        ({}, {"precision": "bf16-mixed", "gradient_clip_val": 0.3, "accumulate_grad_batches": 2}),
        ({}, {"precision": "bf16-true"}),
        ({}, {"precision": "16-mixed"}),
        ({}, {"precision": "bf16-mixed", "deterministic": True}),
        ({}, {"precision": "bf16-mixed", "strategy": "ddp"}),
        ({}, {"precision": "bf16-mixed", "strategy": "fsdp2"}),
        ({"packing": True, "activation_checkpointing": True}, {"precision": "bf16-mixed"}),
        ({"lr_scheduler": "cosine", "warmup_steps": 1}, {"precision": "bf16-mixed", "log_every_n_steps": 1}),
        ({"teacher": "cache"}, {"precision": "bf16-mixed"}),
    ],
    ids=lambda value: " ".join(str(each) for each in value.values()),
)
def test_no_code_of_ours_waits_in_a_step(
    data: InstructionDataModule, tmp_path: Path, module: dict[str, Any], settings: dict[str, Any]
) -> None:
    teacher = write(gpt2(24), tmp_path / "cache", data) if "teacher" in module else None
    settings = {"limit_train_batches": 6, "limit_val_batches": 0, "callbacks": [Watch()], **settings}
    with waits() as places:
        train(data, teacher=teacher, module={k: v for k, v in module.items() if k != "teacher"}, **settings)
    assert any(place.startswith(__file__) for place in places), "the watch would notice"
    ours = str(Path(akl_lightning.__file__).parent)
    assert not [place for place in places if place.startswith(ours)]
    others = [place for place in places if not place.startswith(__file__)]
    assert not [place for place in others if not any(name in place for name in THEIRS)]


# --------------------------------------------------------------------------------------------------------------------
# Stopped and resumed


class Asks(Callback):
    """Asks the run to end, as a signal does, and notes when every rank knows of it."""

    agreed: int | None = None

    def __init__(self, step: int) -> None:
        self.step = step

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        if trainer.global_step == self.step:
            pl_module.stop_requested = True  # type: ignore[assignment]

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        if pl_module.stop_agreed and self.agreed is None:
            self.agreed = trainer.global_step


def dropping() -> nn.Module:
    config = GPT2Config(vocab_size=300, n_positions=64, n_embd=16, n_layer=2, n_head=2, bos_token_id=0, eos_token_id=0)
    return GPT2LMHeadModel(config)


@pytest.mark.parametrize(
    ("strategy", "precision"), [("auto", "32-true"), ("auto", "16-mixed"), ("fsdp2", "bf16-mixed")]
)
def test_a_run_that_was_stopped_goes_on_to_the_same_bits(
    data: InstructionDataModule, tmp_path: Path, strategy: str, precision: str
) -> None:
    def run(name: str, *callbacks: Callback, ckpt_path: str | None = None) -> tuple[Found, Found]:
        seed_everything(3, verbose=False)
        module = DistillationModule(
            dropping(), gpt2(24), optimizer=partial(torch.optim.AdamW, lr=1e-2), lr_scheduler="cosine", warmup_steps=2
        )
        trainer = Trainer(
            **{**QUIET, "accelerator": ACCELERATOR, "enable_checkpointing": True}, **in_precision(precision, strategy),
            devices=1, max_epochs=2, limit_train_batches=6, limit_val_batches=1, gradient_clip_val=0.5,
            accumulate_grad_batches=2, deterministic=True, callbacks=[*callbacks, LastCheckpoint(tmp_path / name)],
        )  # fmt: skip
        trainer.fit(module, data, ckpt_path=ckpt_path)
        return weights(trainer), {name: value.cpu() for name, value in trainer.callback_metrics.items()}

    undisturbed = run("undisturbed")
    asks = Asks(1)
    with pytest.raises(SystemExit):
        run("stopped", asks)
    assert asks.agreed is not None and asks.agreed <= asks.step + 2
    again = run("stopped", ckpt_path=str(tmp_path / "stopped/last.ckpt"))
    for ours, theirs in zip(again, undisturbed, strict=True):
        assert ours.keys() == theirs.keys()
        assert not [name for name, value in theirs.items() if not torch.equal(ours[name], value)]
