"""Measure what it takes to load conversations: seconds and memory, for files of several sizes.

    python recipes/benchmark_data.py
    python recipes/benchmark_data.py --sizes [10000,100000]

Conversations of two to six turns are written to a JSON Lines file in a temporary folder, one in fifty a copy of an
earlier one. Each size is then loaded and split twice, every time in a process of its own: the first reads the file and
writes its records, the second finds them. Memory is the peak of the process beyond what the imports had taken; pages
of the mapped file count while they are in memory, and are given back when others want it. For comparison, a process
that holds what ``json.loads`` makes of each line.
"""

import json
import multiprocessing
import os
import random
import resource
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import datasets
from jsonargparse import auto_cli
from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table
from tqdm import tqdm

from akl_lightning.cli import run_command
from akl_lightning.data.sources import Files
from akl_lightning.data.splits import split_records

MIB = 2**20


def main(sizes: tuple[int, ...] = (10_000, 100_000, 1_000_000)) -> None:
    """Print the table.

    Args:
        sizes: conversations of each file.
    """
    table = Table(
        "conversations",
        "file",
        "how",
        "seconds",
        "of the CPU",
        "memory",
        "of it not mapped",
        "records kept",
        box=SIMPLE,
    )
    with tempfile.TemporaryDirectory() as folder:
        for size in sizes:
            path = Path(folder) / f"{size}.jsonl"
            with path.open("w") as file:
                file.writelines(json.dumps({"messages": one}) + "\n" for one in tqdm(conversations(size), total=size))
            ways = {"read and written": load, "found": load, "json.loads, a list": hold}
            for name, way in ways.items():
                # One at a time, each new: a peak is never given back.
                with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
                    seconds, busy, peak, held, kept = pool.submit(measure, way, str(path), f"{folder}/cache").result()
                file_size = f"{path.stat().st_size / MIB:,.0f} MiB"
                figures = (
                    f"{seconds:.1f}",
                    f"{busy:.1f}",
                    f"{peak / MIB:,.0f} MiB",
                    f"{held / MIB:,.0f} MiB",
                    f"{kept:,}",
                )
                table.add_row(f"{size:,}", file_size, name, *figures)
            path.unlink()
    Console(width=120).print(table)


def conversations(count: int) -> Iterator[list[dict[str, str]]]:
    draw = random.Random(0)
    words = [f"{first}{last}" for first in ("di", "sto", "la", "mer", "ta", "no") for last in ("n", "rel", "do", "st")]
    recent: list[list[dict[str, str]]] = []
    for index in range(count):
        if index % 50 == 49:
            yield draw.choice(recent)
            continue
        turns = [
            {"role": role, "content": " ".join(draw.choices(words, k=draw.randint(5, length)))}
            for _ in range(draw.randint(1, 3))
            for role, length in (("user", 30), ("assistant", 90))
        ]
        recent = [*recent[-20:], turns]
        yield turns


def measure(way: Any, path: str, cache: str) -> tuple[float, float, int, int, int]:
    """Seconds, those of the CPU, bytes of the peak, bytes at the end that no file backs, and records that are left."""
    datasets.config.HF_DATASETS_CACHE = cache
    datasets.disable_progress_bars()
    before, held = peak_memory(), anonymous_memory()
    begun, busy = time.perf_counter(), time.process_time()
    kept = way(path)
    seconds, busy = time.perf_counter() - begun, time.process_time() - busy
    return seconds, busy, peak_memory() - before, anonymous_memory() - held, kept.count


class Kept:
    """Whatever is in memory at the end, and how many records that are."""

    def __init__(self, count: int, what: Any) -> None:
        self.count, self.what = count, what


def load(path: str) -> Kept:
    splits = split_records(Files(path).load(), 0.05, 0.05)
    return Kept(sum(len(split) for split in splits.values()), splits)


def hold(path: str) -> Kept:
    with open(path) as lines:
        records = [json.loads(line) for line in lines]
    return Kept(len(records), records)


def peak_memory() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def anonymous_memory() -> int:
    fields = dict(line.split(":") for line in Path(f"/proc/{os.getpid()}/status").read_text().splitlines())
    return int(fields["RssAnon"].split()[0]) * 1024


if __name__ == "__main__":
    run_command(lambda: auto_cli(main, as_positional=False))
