"""The Triton kernel is compiled for each architecture, without a GPU: its registers, and that none is spilled.

``python -m tests.kernels.test_triton_ahead`` prints a longer list.
"""

import itertools
import os
import re
import subprocess
from collections.abc import Collection
from pathlib import Path
from typing import Any

import pytest

from akl_lightning.kernels import triton as kernel
from akl_lightning.kernels import triton_classes

triton = pytest.importorskip("triton", reason="Triton is not installed")
INTEGERS = (
    "vocab", "rows", "s_stride", "t_stride", "g_stride", "within", "adaptive",
    "count", "blocks", "columns", "z_stride", "shares_stride", "slopes_stride",
)  # fmt: skip
ALIGNED = ("LABELS", "OUT")
IN_ROWS = ("S", "T", "G", "s_stride", "t_stride", "g_stride")


def registers_and_stack(
    folder: Path, architecture: int, pair: str | None = None, vocab: int = 151_936, softened: bool = False,
    gradient: str | None = "bf16", logits: str = "fp32", teacher: bool = True, aligned: bool = True,
    per_row: bool = False,
) -> tuple[int, int]:  # fmt: skip
    """Registers a thread and bytes of stack, where spilled registers go."""
    function = kernel._compare if teacher else kernel._cross_entropy
    block, warps = kernel._launch(vocab)
    constants: dict[str, Any] = {
        "PAIR": kernel.PAIRS.get(pair), "SOFTENED": softened, "GRADIENT": gradient is not None, "BLOCK": block,
        "SUMS": block // 4 if aligned else block, **({} if per_row or not teacher else {"ALPHA": None}),
    }  # fmt: skip
    pointers = {"S": logits, "T": logits, "G": gradient or logits, "LABELS": "i64", "OUT": "fp32"}
    pointers["ALPHA"] = "fp32" if teacher else "fp64"
    divisible = {*ALIGNED, *(IN_ROWS if aligned else ())}
    return compiled(folder, function, constants, pointers, architecture, warps, divisible)


def compiled(
    folder: Path, function: Any, constants: dict[str, Any], pointers: dict[str, str], architecture: int, warps: int,
    divisible: Collection[str] = (),
) -> tuple[int, int]:  # fmt: skip
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    constants = {name: value for name, value in constants.items() if name in function.arg_names}
    signature = {
        name: "constexpr" if name in constants
        else f"*{pointers[name]}" if name in pointers
        else "i32" if name in INTEGERS
        else "fp32"
        for name in function.arg_names
    }  # fmt: skip
    known = {(n,): [["tt.divisibility", 16]] for n, name in enumerate(function.arg_names) if name in divisible}
    source = ASTSource(function, signature, {(function.arg_names.index(k),): v for k, v in constants.items()}, known)
    options = {"num_warps": warps, "num_stages": 1, "enable_fp_fusion": True}
    result = triton.compile(source, target=GPUTarget("cuda", architecture, 32), options=options)
    file = folder / "kernel.cubin"
    file.write_bytes(result.asm["cubin"])
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    report = subprocess.run([tool, "-res-usage", file], capture_output=True, text=True, check=True).stdout
    registers, stack = re.search(r"REG:(\d+) STACK:(\d+)", report).groups()
    return int(registers), int(stack)


VARIANTS = [
    *({"architecture": architecture} for architecture in (80, 90, 100)),
    *({"architecture": 90, "pair": pair} for pair in kernel.PAIRS),
    *({"architecture": architecture, "pair": "skew_reverse_kl", "softened": True} for architecture in (80, 90, 100)),
    {"architecture": 90, "softened": True},
    {"architecture": 90, "gradient": None},
    {"architecture": 90, "logits": "bf16"},
    {"architecture": 90, "vocab": 2000, "gradient": "fp32"},
    {"architecture": 90, "pair": "jensen_shannon", "softened": True, "aligned": False},
    {"architecture": 90, "teacher": False},
    *({"architecture": architecture, "per_row": True} for architecture in (80, 90, 100)),
    {"architecture": 90, "pair": "total_variation", "softened": True, "per_row": True},
]


@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="the interpreter compiles nothing")
@pytest.mark.parametrize("variant", VARIANTS, ids=lambda variant: "-".join(map(str, variant.values())))
def test_no_register_is_spilled(variant: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "cache"))
    registers, stack = registers_and_stack(tmp_path, **variant)
    print(variant, registers, "registers")
    assert registers and not stack


@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="the interpreter compiles nothing")
@pytest.mark.parametrize("architecture", [80, 90, 100])
@pytest.mark.parametrize("name", ["_merge", "_merge alone", "_spread"])
def test_classes(name: str, architecture: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "cache"))
    function = getattr(triton_classes, name.split()[0])
    pointers = dict.fromkeys(("BEGIN", "MORE", "FEW", "MANY"), "i32") | {"OF_COLUMN": "i64", "AT_LABEL": "i64"}
    pointers |= dict.fromkeys(("Z", "SHARES_OUT", "SLOPES", "SHARES", "WEIGHT"), "fp32") | {"G": "bf16"}
    constants: dict[str, Any] = {"LANES": triton_classes._LANES, "BLOCK": triton_classes._BLOCK}
    if name.startswith("_merge"):
        constants["SHARES"] = name == "_merge"
    registers, stack = compiled(tmp_path, function, constants, pointers, architecture, 4)
    print(name, architecture, registers, "registers")
    assert registers and not stack


if __name__ == "__main__":
    import tempfile

    with tempfile.TemporaryDirectory() as scratch:
        os.environ["TRITON_CACHE_DIR"] = scratch
        every = itertools.product((80, 90, 100), (None, *kernel.PAIRS), (False, True), ("bf16", None), ("fp32", "bf16"))
        for architecture, pair, softened, gradient, logits in every:
            used = registers_and_stack(Path(scratch), architecture, pair, 151_936, softened, gradient, logits)
            print(
                f"sm_{architecture} {pair or 'a FKL + b RKL'} softened {softened} gradient {gradient} "
                f"logits {logits}: {used[0]} registers, {used[1]} bytes of stack", flush=True,
            )  # fmt: skip
