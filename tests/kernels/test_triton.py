"""The Triton kernel against the dense formulas: under Triton's interpreter on a CPU, and on a GPU where one is.

On a GPU most of the time goes into compiling: a variant is a pair, whether there is a temperature, the dtypes, whether
rows are aligned, and a size of block. Tests share them where they can.
"""

import math
import os
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from akl_lightning import criterion
from akl_lightning.kernels import pairs, triton_head
from akl_lightning.kernels import triton as kernel
from akl_lightning.kernels.pairs import Comparison
from tests import references

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
BLOCK = {"cpu": 256, "cuda": 4096}
ROWS = {"cpu": 1, "cuda": 8}
"""Rows of each kind."""


def padded(x: Tensor) -> Tensor:
    """The same in rows that begin at multiples of 64, as logits of real models do."""
    wide = torch.empty(len(x), -(-x.shape[1] // 64) * 64, dtype=x.dtype, device=x.device)
    return wide[:, : x.shape[1]].copy_(x)


def empty(s: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """For the gradient."""
    return padded(torch.full(s.shape, torch.nan, dtype=dtype, device=s.device))


def make(kind: str, device: str) -> tuple[Tensor, Tensor]:
    """Logits of student and teacher, in float32."""
    rows, vocab = shape = ROWS[device], VOCAB[device]
    noise, other = torch.randn(shape), torch.randn(shape)
    t = 3 * noise
    # Few tokens carry the mass, so that whatever mu is, the masses of larger and larger heads keep off it.
    rank = torch.rand(shape).argsort(-1).double()
    steep = -0.2 * (1 + 0.2 * torch.rand(rows, 1))
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
        case "steep":
            t = (steep * rank).clamp(min=-30).float() + 0.01 * noise
            return t + other, t
        case "steps":
            t = (4 * steep * (rank / 4).floor()).clamp(min=-30).float()
            return t + other, t
        case "crowded":  # down one lane after the other
            lane, depth = torch.arange(vocab) % BLOCK[device], torch.arange(vocab) // BLOCK[device]
            rank = lane * (depth[-1] + 1) + depth
            t = (steep * rank).clamp(min=-30).float() + 0.01 * noise
            return t + other, t
        case "far":  # the first block lies far below the rest, and both lie far from 0
            t[:, : shape[1] // 2] -= 200
            return t + other - 500, t + 900
        case "equal":
            return t.clone(), t
    raise ValueError(kind)


def batch(kinds: str, device: str, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor]:
    logits = [make(kind, device) for kind in kinds.split()]
    s, t = (padded(torch.cat(x).to(dtype).to(device)) for x in zip(*logits, strict=True))
    return s, t, torch.randint(0, s.shape[1], (len(s),)).to(device)


def launch(device: str) -> kernel.Launch | None:
    return kernel.Launch(BLOCK[device], 2) if device == "cpu" else None


def close(ours: Tensor, right: Tensor, scale: float | Tensor = 1.0, name: str = "") -> None:
    wrong = (ours.double() - right).abs() > 1e-5 * right.abs() + 1e-6 * scale
    same = (ours.double() == right) | (ours.isnan() & right.isnan())
    assert (same | ~wrong & right.isfinite()).all(), f"{name}: {ours.tolist()} instead of {right.tolist()}"


def check(
    s: Tensor, t: Tensor, y: Tensor, how: Comparison, into: Tensor | None = None, tolerance: float = 1e-5,
    ambiguous: float = 0.15,
) -> None:  # fmt: skip
    """Statistics and gradient.

    Rows whose heads rounding may decide are left out of what depends on the head, and may be this share of all.
    """
    right, gradient, unsure = references.compare(s, t, y, *how)
    into = empty(s) if into is None else into
    ours = kernel.compare(s, t, y, how, into, launch(s.device.type))
    assert unsure.double().mean() <= ambiguous
    of_the_head = {"head_gap", "tail_gap", "head_weight"}
    if how.pair == "adaptive_kl":
        of_the_head |= {"loss", "divergence", "gradient"}
    everywhere = torch.ones_like(unsure)
    for name, value in right.items():
        assert ours[name].dtype == torch.float32 and ours[name].shape == y.shape
        keep = ~unsure if name in of_the_head else everywhere
        scale = torch.ones_like(value)
        if name in ("loss", "divergence"):
            scale *= max(1, how.temperature**2)
        if name == "head_weight":  # the quotient of two gaps that are known to some 1e-7 themselves
            scale = (right["head_gap"] + right["tail_gap"]).clamp(1e-30, 1).reciprocal()
        close(ours[name][keep], value[keep], scale[keep], name)
    close(ours["head_gap"] + ours["tail_gap"], right["head_gap"] + right["tail_gap"])
    keep = ~unsure if "gradient" in of_the_head else everywhere
    error = (into.double() - gradient)[keep].norm(dim=-1)
    assert (error <= tolerance * gradient[keep].norm(dim=-1) + 1e-9).all(), error / gradient[keep].norm(dim=-1)


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """How often the interpreter enters what few rows need."""
    counts: Counter[str] = Counter()

    def counted(name: str, function: Callable[..., object]) -> Callable[..., object]:
        def call(*args: object) -> object:
            counts[name] += 1
            return function(*args)

        return call

    rare = [(kernel, "sums"), (kernel, "slope_without_masked")]
    rare += [(triton_head, "_masses_of_row"), (triton_head, "_largest_below")]
    for module, name in rare if INTERPRETED else []:
        monkeypatch.setattr(module, name, counted(name, getattr(module, name)))
    return counts


TEMPERED = list(PAIRS) if INTERPRETED else ["adaptive_kl", "skew_reverse_kl"]


@on_each_device
@pytest.mark.parametrize(("name", "temperature"), [*((name, 1.0) for name in PAIRS), *((x, 2.5) for x in TEMPERED)])
def test_divergences(name: str, temperature: float, device: str) -> None:
    s, t, y = batch("near apart ties peaked", device)
    # At the temperature the same rows as without, lest their heads be of many thousand tokens.
    s, t = padded(s * temperature), padded(t * temperature)
    check(s, t, y, Comparison(name, PAIRS[name], alpha=0.7, temperature=temperature))


@on_each_device
@pytest.mark.parametrize(("divergence", "tolerance"), [(1e-3, 1e-5), (1e-4, 5e-5)])
@pytest.mark.parametrize("name", PAIRS)
def test_a_student_near_its_teacher(name: str, divergence: float, tolerance: float, device: str) -> None:
    """Of ``q - p`` float32 leaves what remains after errors of 1e-7 of ``p`` and ``q``; at 1e-4 that is not 1e-5."""
    t = 3 * torch.randn(2 * ROWS[device], VOCAB[device])
    s = t + math.sqrt(2 * divergence) * torch.randn(t.shape)
    s, t, y = padded(s.to(device)), padded(t.to(device)), torch.zeros(len(s), dtype=torch.long, device=device)
    how = Comparison(name, PAIRS[name], alpha=1.0)
    right, gradient, unsure = references.compare(s, t, y, *how)
    assert divergence / 2 < right["fkl"].mean() < divergence * 2 and unsure.double().mean() <= 0.1
    into = empty(s)
    ours = kernel.compare(s, t, y, how, into, launch(device))
    close(ours["divergence"][~unsure], right["divergence"][~unsure])
    if name == "total_variation":  # its slope jumps where q = p: rounding may put a token on the other side
        tolerance = 2e-4
    assert (into.double() - gradient)[~unsure].norm() <= tolerance * gradient[~unsure].norm()


@on_each_device
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_logits(dtype: torch.dtype, device: str) -> None:
    check(*batch("near apart ties peaked", device, dtype), Comparison("adaptive_kl"))


@on_each_device
@pytest.mark.parametrize("head_rule", ["cover", "within"])
@pytest.mark.parametrize("mu", [0.02, 0.5, 0.9, 0.999, 1.0])
def test_heads(mu: float, head_rule: str, device: str) -> None:
    s, t, y = batch("steep steps crowded", device)
    # Heads of nearly all the mass end among tokens of 2e-4 each.
    check(s, t, y, Comparison("adaptive_kl", mu=mu, head_rule=head_rule), ambiguous=0.4 if mu == 0.999 else 0.1)


@on_each_device
@pytest.mark.parametrize("head_rule", ["cover", "within"])
def test_heads_of_many_tokens(head_rule: str, calls: Counter[str], device: str) -> None:
    """So many that a boundary is always near mu, and that it does not matter which of them is taken."""
    s, t, y = batch("flat", device)
    how = Comparison("adaptive_kl", mu=0.5, head_rule=head_rule)
    check(s, t, y, how, ambiguous=1.0)
    right, _, _ = references.compare(s, t, y, *how)
    ours = kernel.compare(s, t, y, how, empty(s), launch(device))
    assert 0.05 < right["head_weight"].mean() < 0.95
    close(ours["head_gap"], right["head_gap"])
    close(ours["tail_gap"], right["tail_gap"])
    assert not INTERPRETED or (calls["_masses_of_row"] and calls["_largest_below"])


def fullest_lane(t: Tensor, how: Comparison) -> Tensor:
    """The most tokens of the head that a lane has, ``[rows]``."""
    rows = [references.logits(x) for x in t]
    heads = [references.membership(x, x.softmax(-1), how.mu, how.head_rule)[0] > 0 for x in rows]
    block = BLOCK[t.device.type]
    room = torch.nn.functional.pad(torch.stack(heads).long(), (0, -t.shape[1] % block))
    return room.view(len(t), -1, block).sum(1).amax(1)


@on_each_device
def test_lanes_that_hold_more_of_the_head_than_they_keep(calls: Counter[str], device: str) -> None:
    how = Comparison("adaptive_kl")
    s, t, y = batch("steep", device)
    assert (fullest_lane(t, how) < 3).all()
    check(s, t, y, how)
    assert not calls["_masses_of_row"]
    s, t, y = batch("crowded", device)
    assert (fullest_lane(t, how) >= 3).all()
    check(s, t, y, how)
    assert not INTERPRETED or calls["_masses_of_row"]


@on_each_device
@pytest.mark.parametrize("head_rule", ["cover", "within"])
def test_equals_share_the_crossing(head_rule: str, calls: Counter[str], device: str) -> None:
    t = torch.full((5, VOCAB[device]), -4.0)
    t[0, : 601 if device == "cpu" else 20_001] = 14.0  # several in each lane
    t[1, ::7] = 1.0
    t[2, 5] = t[2, 300] = 9.0
    t[3:, 1 :: BLOCK[device]] = 14.0  # all in one lane
    t[4, 2] = 15.0
    s, y = padded(torch.randn(t.shape).to(device)), torch.arange(5, device=device)
    check(s, padded(t.to(device)), y, Comparison("adaptive_kl", head_rule=head_rule), ambiguous=0)
    # One look at the value that a lane had more of than it keeps.
    assert not INTERPRETED or calls["_masses_of_row"] == 3


@on_each_device
@pytest.mark.parametrize("name", PAIRS)
def test_equal_logits_cost_nothing(name: str, device: str) -> None:
    s, t, y = batch("equal flat", device)
    t.copy_(s)
    into = empty(s)
    ours = kernel.compare(s, t, y, Comparison(name, PAIRS[name], alpha=1.0), into, launch(device))
    assert not into.any() and (ours["head_weight"] == 0.5).all() and (ours["top1_agreement"] == 1).all()
    for statistic in ("loss", "divergence", "fkl", "rkl", "head_gap", "tail_gap"):
        assert not ours[statistic].any(), statistic


def mask(x: Tensor, where: slice | Tensor, lowest: bool) -> None:
    x[:, where] = torch.finfo(x.dtype).min if lowest else -torch.inf


@on_each_device
@pytest.mark.parametrize("lowest", [False, True])
@pytest.mark.parametrize("sides", ["both", "student", "teacher"])
@pytest.mark.parametrize(
    "name", ["adaptive_kl", "forward_kl", "reverse_kl", "jensen_shannon", "skew_forward_kl", "skew_reverse_kl"]
)
def test_masked_tokens(name: str, sides: str, lowest: bool, calls: Counter[str], device: str) -> None:
    s, t, _ = batch("apart" if INTERPRETED else "near apart", device)
    where = slice(100, 400)
    if sides != "teacher":
        mask(s, where, lowest)
    if sides != "student":
        mask(t, where, not lowest)
    check(s, t, torch.full((len(s),), 50, device=device), Comparison(name, PAIRS[name]))
    if sides == "teacher" and name in pairs.MIXES:  # RKL is infinite, and its slope that of the other tokens
        assert (t <= -3e38).any() and (s > -3e38).all()
        assert not INTERPRETED or calls["slope_without_masked"]


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
    ours = kernel.compare(*logits, y, Comparison("adaptive_kl"), empty(logits[0]), launch(device))
    assert ours["loss"].isnan().all()
    assert ours["fkl"].isnan().all()


@on_each_device
def test_in_place_in_rows_of_any_stride(device: str) -> None:
    s, t, y = batch("near apart", device)
    right, gradient, _ = references.compare(s, t, y, "adaptive_kl")
    wide = torch.full((len(s), s.shape[1] + 13), 7.0, device=device)
    inside = wide[:, 5:-8].copy_(s)
    ours = kernel.compare(inside, t, y, Comparison("adaptive_kl"), inside, launch(device))
    close(ours["loss"], right["loss"])
    assert ((inside - gradient).norm() / gradient.norm()) < 1e-5
    assert (wide[:, :5] == 7).all() and (wide[:, -8:] == 7).all()


@on_each_device
def test_gradient_in_a_dtype_of_its_own(device: str) -> None:
    s, t, y = batch("near apart", device)
    into = empty(s, torch.bfloat16)
    check(s, padded(t.to(torch.bfloat16)), y, Comparison("adaptive_kl"), into, tolerance=4e-3)


@on_each_device
def test_without_a_gradient(device: str) -> None:
    s, t, y = batch("near apart", device, torch.bfloat16)
    before = s.clone(), t.clone()
    ours = kernel.compare(s, t, y, Comparison("adaptive_kl"), None, launch(device))
    again = kernel.compare(s, t, y, Comparison("adaptive_kl"), empty(s), launch(device))
    for name in ours:  # another kernel to the compiler, which may contract sums and products otherwise
        torch.testing.assert_close(ours[name], again[name], rtol=1e-6, atol=1e-7)
    assert torch.equal(s, before[0]) and torch.equal(t, before[1])


@on_each_device
def test_references_far_from_the_maxima(calls: Counter[str], device: str) -> None:
    s, t, _ = batch("far", device)
    y = torch.full((len(s),), 3, device=device)
    for x in (s, t):  # what the kernel guesses
        guess = torch.maximum(x[:, : BLOCK[device]].amax(-1), x[:, 3])
        assert ((x.amax(-1) - guess) * math.log2(math.e) > 16).all()
    check(s, t, y, Comparison("adaptive_kl"))
    assert not INTERPRETED or calls["sums"] == 2 * len(s)


@on_each_device
def test_without_a_teacher(device: str) -> None:
    s, _, y = batch("apart ties far", device)
    into = empty(s)
    ours = kernel.compare(s, None, y, Comparison(None, alpha=0.0), into, launch(device))
    x = s.double().requires_grad_()
    right = torch.nn.functional.cross_entropy(x, y, reduction="none")
    right.sum().backward()
    assert set(ours) == {"loss", "cross_entropy"}
    close(ours["loss"], right.detach())
    close(ours["cross_entropy"], right.detach())
    assert ((into - x.grad).norm(dim=-1) <= 1e-5 * x.grad.norm(dim=-1)).all()


@on_each_device
def test_a_weight_of_zero_switches_its_part_off(device: str) -> None:
    s, t, y = batch("apart", device)
    t[:, 100:] = -torch.inf
    ours = kernel.compare(s, t, y, Comparison("reverse_kl", alpha=0.0), empty(s), launch(device))
    assert ours["divergence"].isinf().all() and torch.equal(ours["loss"], ours["cross_entropy"])
    s[:, y] = -torch.inf
    ours = kernel.compare(s, s.clone(), y, Comparison("reverse_kl", alpha=1.0), empty(s), launch(device))
    assert ours["cross_entropy"].isinf().all() and not ours["loss"].any()


@on_each_device
@pytest.mark.parametrize("name", ["adaptive_kl", "jensen_shannon"])
def test_a_weight_of_its_own_for_each_row(name: str, device: str) -> None:
    s, t, y = batch("near apart peaked" if INTERPRETED else "near apart", device)
    alphas = torch.tensor([0.3, 0.0, 1.0] * len(s), device=device)[: len(s)]
    into, how = empty(s), Comparison(name, PAIRS[name], 0.6)
    ours = kernel.compare(s, t, y, how._replace(alpha=alphas), into, launch(device))
    for alpha in (0.3, 0.0, 1.0):
        same = alphas == torch.tensor(alpha, device=device)
        alone = empty(s[same])
        right = kernel.compare(
            padded(s[same]), padded(t[same]), y[same], how._replace(alpha=alpha), alone, launch(device)
        )
        assert same.any() and all(torch.equal(ours[name][same], values) for name, values in right.items())
        assert torch.equal(into[same], alone)
    ours = kernel.compare(s, None, y, how._replace(alpha=alphas), into, launch(device))
    x = s.double().requires_grad_()
    right = torch.nn.functional.cross_entropy(x, y, reduction="none") * (1 - alphas.double())
    right.sum().backward()
    close(ours["loss"], right.detach())
    assert ((into - x.grad).norm(dim=-1) <= 1e-5 * x.grad.norm(dim=-1)).all()


@on_each_device
def test_no_rows(device: str) -> None:
    none = torch.empty(0, 100, device=device)
    ours = kernel.compare(none, none, none[:, 0].long(), Comparison("adaptive_kl"), none)
    assert [len(x) for x in ours.values()] == [0] * 9


@on_each_device
def test_small_vocabularies(device: str) -> None:
    for vocab in (1, 2, 63, 64, 1100):
        s, t = (padded(torch.randn(2, vocab, device=device)) for _ in range(2))
        y = torch.zeros(2, dtype=torch.long, device=device)
        right, gradient, _ = references.compare(s, t, y, "adaptive_kl")
        into = empty(s)
        ours = kernel.compare(s, t, y, Comparison("adaptive_kl"), into)
        close(ours["loss"], right["loss"])
        torch.testing.assert_close(into.double(), gradient, rtol=1e-5, atol=1e-6)


@pytest.mark.gpu
@pytest.mark.skipif(INTERPRETED or not torch.cuda.is_available(), reason="no GPU")
def test_same_bits_again_and_no_waiting() -> None:
    s, t, y = batch("near apart ties flat", "cuda")
    first, into = None, empty(s)
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


def test_names() -> None:
    assert kernel.STATISTICS == criterion.STATISTICS
    assert set(kernel.PAIRS) == set(pairs.PAIRS) - set(pairs.MIXES)


def test_what_it_takes() -> None:
    x = torch.randn(2, 8)
    assert kernel.supports(x, x) == INTERPRETED
    assert not kernel.supports(x.double(), x)
    assert not kernel.supports(x.t(), None)


@pytest.mark.skipif(INTERPRETED, reason="is the interpreter")
@pytest.mark.slow
def test_under_the_interpreter() -> None:
    """The kernels' tests on a CPU, in a process of their own: Triton decides when it is imported."""
    files = [__file__, str(Path(__file__).with_name("test_classes.py"))]
    run = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-x", "-n", "0", "-p", "no:cacheprovider", *files],
        env={**os.environ, "TRITON_INTERPRET": "1"}, cwd=Path(__file__).parents[2], capture_output=True, text=True,
        check=False,
    )  # fmt: skip
    assert run.returncode == 0, run.stdout[-4000:]
