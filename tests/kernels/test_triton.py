"""The Triton kernel against the dense formulas: under Triton's interpreter on a CPU, and on a GPU where one is."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

from akl_lightning.kernels import triton as kernel
from akl_lightning.kernels.pairs import Comparison
from tests.kernels import dense

pytest.importorskip("triton", reason="Triton is not installed")

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICES = [
    pytest.param("cpu", marks=pytest.mark.skipif(not INTERPRETED, reason="needs TRITON_INTERPRET=1")),
    pytest.param(
        "cuda",
        marks=[pytest.mark.gpu, pytest.mark.skipif(INTERPRETED or not torch.cuda.is_available(), reason="no GPU")],
    ),
]
on_each_device = pytest.mark.parametrize("device", DEVICES)
PAIRS = {
    "forward_kl": 0.0, "reverse_kl": 0.0, "weighted_kl": 0.3, "adaptive_kl": 0.0, "jensen_shannon": 0.3,
    "skew_forward_kl": 0.1, "skew_reverse_kl": 0.1, "total_variation": 0.0,
}  # fmt: skip
VOCAB = {"cpu": 603, "cuda": 50_257}
ROWS = {"cpu": 1, "cuda": 8}
"""Rows of each kind."""


def make(kind: str, device: str) -> tuple[Tensor, Tensor]:
    """Logits of student and teacher, in float32."""
    shape = ROWS[device], VOCAB[device]
    noise, other = torch.randn(shape), torch.randn(shape)
    t = 3 * noise
    match kind:
        case "near":
            return t + 0.01 * other, t
        case "apart":
            return 3 * other, t
        case "ties":
            return (2 * other).round(), t.round()
        case "flat":
            return 0.02 * other, 0.01 * noise
        case "peaked":
            t[:, -7] += 20
            return t + other, t
        case "far":  # the first block lies far below the rest, and both lie far from 0
            t[:, : shape[1] // 2] -= 200
            return t + other - 500, t + 900
        case "equal":
            return t.clone(), t
    raise ValueError(kind)


def batch(kinds: str, device: str, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor]:
    pairs = [make(kind, device) for kind in kinds.split()]
    s, t = (torch.cat(x).to(dtype).to(device) for x in zip(*pairs, strict=True))
    return s, t, torch.randint(0, s.shape[1], (len(s),), device=device)


def launch(device: str) -> kernel.Launch | None:
    return kernel.Launch(256, 4) if device == "cpu" else None


def close(ours: Tensor, right: Tensor, scale: float | Tensor = 1.0, name: str = "") -> None:
    wrong = (ours.cpu().double() - right).abs() > 1e-5 * right.abs() + 1e-6 * scale
    same = (ours.cpu().double() == right) | (ours.cpu().isnan() & right.isnan())
    assert (same | ~wrong & right.isfinite()).all(), f"{name}: {ours.tolist()} instead of {right.tolist()}"


def check(
    s: Tensor, t: Tensor, y: Tensor, how: Comparison, into: Tensor | None = None, tolerance: float = 1e-5,
    ambiguous: float = 0.1,
) -> None:  # fmt: skip
    right, gradient, unsure = dense.compare(s, t, y, *how)
    into = torch.full_like(s, torch.nan, dtype=torch.float32) if into is None else into
    ours = kernel.compare(s, t, y, how, into, launch(s.device.type))
    assert unsure.double().mean() <= ambiguous
    keep = ~unsure
    for name, value in right.items():
        assert ours[name].dtype == torch.float32 and ours[name].shape == y.shape
        scale = torch.ones(len(y), dtype=torch.double)
        if name in ("loss", "divergence"):
            scale *= max(1, how.temperature**2)
        if name == "head_weight":  # the quotient of two gaps that are known to some 1e-7 themselves
            scale = (right["head_gap"] + right["tail_gap"]).clamp(1e-30, 1).reciprocal()
        close(ours[name][keep], value[keep], scale[keep], name)
    error = (into.cpu().double() - gradient)[keep].norm(dim=-1)
    assert (error <= tolerance * gradient[keep].norm(dim=-1) + 1e-9).all(), error / gradient[keep].norm(dim=-1)


@on_each_device
@pytest.mark.parametrize("temperature", [1.0, 2.5])
@pytest.mark.parametrize("name", PAIRS)
def test_divergences(name: str, temperature: float, device: str) -> None:
    s, t, y = batch("near apart ties peaked", device)
    check(s, t, y, Comparison(name, PAIRS[name], alpha=0.7, temperature=temperature))


@on_each_device
@pytest.mark.parametrize("name", PAIRS)
def test_a_student_near_its_teacher(name: str, device: str) -> None:
    check(*batch("near near", device), Comparison(name, PAIRS[name], alpha=1.0), tolerance=2e-5)


@on_each_device
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_logits(dtype: torch.dtype, device: str) -> None:
    check(*batch("near apart ties peaked", device, dtype), Comparison("adaptive_kl"))


@on_each_device
@pytest.mark.parametrize("head_rule", ["cover", "within"])
@pytest.mark.parametrize("mu", [0.02, 0.5, 0.9, 0.999, 1.0])
def test_heads(mu: float, head_rule: str, device: str) -> None:
    s, t, y = batch("ties flat peaked apart far", device)
    # Beyond 0.99 a boundary of these rows is never far from mu.
    check(s, t, y, Comparison("adaptive_kl", mu=mu, head_rule=head_rule), ambiguous=1.0 if mu == 0.999 else 0.2)


@on_each_device
@pytest.mark.parametrize("head_rule", ["cover", "within"])
def test_equals_share_the_crossing(head_rule: str, device: str) -> None:
    t = torch.full((3, VOCAB[device]), -4.0)
    t[1, ::7] = 1.0
    t[2, 5] = t[2, 300] = 9.0
    s, y = torch.randn(t.shape), torch.tensor([1, 2, 3])
    check(s.to(device), t.to(device), y.to(device), Comparison("adaptive_kl", head_rule=head_rule), ambiguous=0)


@on_each_device
def test_equal_logits_cost_nothing(device: str) -> None:
    s, t, y = batch("equal", device)
    into = torch.full_like(s, torch.nan)
    ours = kernel.compare(s, t, y, Comparison("adaptive_kl", alpha=1.0), into, launch(device))
    assert not ours["loss"].any() and not into.any() and (ours["head_weight"] == 0.5).all()


def mask(x: Tensor, where: slice | Tensor, lowest: bool) -> None:
    x[:, where] = torch.finfo(x.dtype).min if lowest else -torch.inf


@on_each_device
@pytest.mark.parametrize("lowest", [False, True])
@pytest.mark.parametrize("sides", ["both", "student", "teacher"])
@pytest.mark.parametrize(
    "name", ["adaptive_kl", "forward_kl", "reverse_kl", "jensen_shannon", "skew_forward_kl", "skew_reverse_kl"]
)
def test_masked_tokens(name: str, sides: str, lowest: bool, device: str) -> None:
    s, t, _ = batch("apart" if INTERPRETED else "near apart", device)
    where = slice(100, 400)
    if sides != "teacher":
        mask(s, where, lowest)
    if sides != "student":
        mask(t, where, not lowest)
    check(s, t, torch.full((len(s),), 50, device=device), Comparison(name, PAIRS[name]))


@on_each_device
def test_masked_in_float16(device: str) -> None:
    s, t, _ = batch("apart", device, torch.float16)
    mask(s, slice(0, 300), True)
    mask(t, slice(0, 300), True)
    check(s, t, torch.full((len(s),), 500, device=device), Comparison("adaptive_kl"))


@on_each_device
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
@pytest.mark.parametrize("side", [0, 1])
def test_what_is_no_number_is_noticed(value: float, side: int, device: str) -> None:
    *logits, y = batch("apart", device)
    logits[side][:, 400] = value
    ours = kernel.compare(*logits, y, Comparison("adaptive_kl"), torch.empty_like(logits[0]), launch(device))
    assert ours["loss"].isnan().all()
    assert ours["fkl"].isnan().all()


@on_each_device
def test_in_place_in_rows_of_any_stride(device: str) -> None:
    s, t, y = batch("near apart", device)
    right, gradient, _ = dense.compare(s, t, y, "adaptive_kl")
    wide = torch.full((len(s), s.shape[1] + 13), 7.0, device=device)
    inside = wide[:, 5:-8].copy_(s)
    ours = kernel.compare(inside, t, y, Comparison("adaptive_kl"), inside, launch(device))
    close(ours["loss"], right["loss"])
    assert ((inside.cpu() - gradient).norm() / gradient.norm()) < 1e-5
    assert (wide[:, :5] == 7).all() and (wide[:, -8:] == 7).all()


@on_each_device
def test_gradient_in_a_dtype_of_its_own(device: str) -> None:
    s, t, y = batch("near apart", device)
    into = torch.full_like(s, torch.nan, dtype=torch.bfloat16)
    check(s, t.to(torch.bfloat16), y, Comparison("adaptive_kl"), into, tolerance=4e-3)


@on_each_device
def test_without_a_gradient(device: str) -> None:
    s, t, y = batch("near apart", device)
    before = s.clone(), t.clone()
    ours = kernel.compare(s, t, y, Comparison("jensen_shannon", 0.3), None, launch(device))
    again = kernel.compare(s, t, y, Comparison("jensen_shannon", 0.3), torch.empty_like(s), launch(device))
    assert all(torch.equal(ours[name], again[name]) for name in ours)
    assert torch.equal(s, before[0]) and torch.equal(t, before[1])


@on_each_device
def test_without_a_teacher(device: str) -> None:
    s, _, y = batch("apart ties far", device)
    into = torch.full_like(s, torch.nan)
    ours = kernel.compare(s, None, y, Comparison(None, alpha=0.0), into, launch(device))
    x = s.cpu().double().requires_grad_()
    right = torch.nn.functional.cross_entropy(x, y.cpu(), reduction="none")
    right.sum().backward()
    assert set(ours) == {"loss", "cross_entropy"}
    close(ours["loss"], right.detach())
    close(ours["cross_entropy"], right.detach())
    assert ((into.cpu() - x.grad).norm(dim=-1) <= 1e-5 * x.grad.norm(dim=-1)).all()


@on_each_device
def test_a_weight_of_zero_switches_its_part_off(device: str) -> None:
    s, t, y = batch("apart", device)
    t[:, 100:] = -torch.inf
    ours = kernel.compare(s, t, y, Comparison("reverse_kl", alpha=0.0), torch.empty_like(s), launch(device))
    assert ours["divergence"].isinf().all() and torch.equal(ours["loss"], ours["cross_entropy"])
    s[:, y] = -torch.inf
    ours = kernel.compare(s, s.clone(), y, Comparison("reverse_kl", alpha=1.0), torch.empty_like(s), launch(device))
    assert ours["cross_entropy"].isinf().all() and not ours["loss"].any()


@on_each_device
def test_no_rows(device: str) -> None:
    none = torch.empty(0, 100, device=device)
    ours = kernel.compare(none, none, none[:, 0].long(), Comparison("adaptive_kl"), none)
    assert [len(x) for x in ours.values()] == [0] * 9


@on_each_device
def test_small_vocabularies(device: str) -> None:
    for vocab in (1, 2, 63, 64, 65):
        s, t = torch.randn(2, vocab, device=device), torch.randn(2, vocab, device=device)
        y = torch.zeros(2, dtype=torch.long, device=device)
        right, gradient, _ = dense.compare(s, t, y, "adaptive_kl")
        into = torch.empty_like(s)
        ours = kernel.compare(s, t, y, Comparison("adaptive_kl"), into)
        close(ours["loss"], right["loss"])
        torch.testing.assert_close(into.cpu().double(), gradient, rtol=1e-5, atol=1e-6)


@pytest.mark.gpu
@pytest.mark.skipif(INTERPRETED or not torch.cuda.is_available(), reason="no GPU")
def test_same_bits_again_and_no_waiting() -> None:
    s, t, y = batch("near apart ties flat", "cuda")
    first, into = None, torch.empty_like(s)
    for _ in range(3):
        torch.cuda.set_sync_debug_mode("error")
        try:
            ours = kernel.compare(s, t, y, Comparison("adaptive_kl"), into)
        finally:
            torch.cuda.set_sync_debug_mode("default")
        now = [*ours.values(), into.clone()]
        assert first is None or all(torch.equal(a, b) for a, b in zip(first, now, strict=True))
        first = now


@pytest.mark.gpu
@pytest.mark.skipif(INTERPRETED or not torch.cuda.is_available(), reason="no GPU")
def test_offsets_beyond_32_bits() -> None:
    vocab = 1 << 20
    s = torch.randn(2200, vocab, device="cuda", dtype=torch.bfloat16)
    y = torch.zeros(len(s), dtype=torch.long, device="cuda")
    whole = kernel.compare(s, s, y, Comparison("adaptive_kl"), None)
    last = kernel.compare(s[-3:], s[-3:], y[-3:], Comparison("adaptive_kl"), None)
    assert torch.equal(whole["loss"][-3:], last["loss"])


def test_what_it_takes() -> None:
    x = torch.randn(2, 8)
    assert kernel.supports(x, x) == INTERPRETED
    assert not kernel.supports(x.double(), x)
    assert not kernel.supports(x.t(), None)


@pytest.mark.skipif(INTERPRETED, reason="is the interpreter")
def test_under_the_interpreter() -> None:
    """The tests above on a CPU, in a process of their own: Triton decides when it is imported."""
    run = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", __file__],
        env={**os.environ, "TRITON_INTERPRET": "1"}, cwd=Path(__file__).parents[2], capture_output=True, text=True,
        check=False,
    )  # fmt: skip
    assert run.returncode == 0, run.stdout[-4000:]
