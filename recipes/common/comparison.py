"""Runs that are compared with each other: shared out between processes, and reported as differences seed by seed."""

import json
import math
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout
from lightning.pytorch import Callback, Trainer
from scipy.stats import t as student_t
from tqdm import tqdm

from akl_lightning.checkpoint import atomic_file
from akl_lightning.cli import DistillationCLI
from akl_lightning.errors import UsageError

# One device a process: work is shared by starting it several times.
QUIET = {"logger": False, "enable_checkpointing": False, "enable_model_summary": False, "devices": 1}
"""Settings of a Trainer that evaluates."""


def remember(output: Path, settings: dict[str, Any]) -> None:
    """Write down what all runs of a folder have in common, or compare it with what was.

    Raises:
        UsageError: they are not the same.
    """
    path = output / "settings.json"
    settings = json.loads(json.dumps(settings))
    if path.exists():
        before = json.loads(path.read_text())
        differing = [name for name in settings if before.get(name) != settings[name]]
        if differing:
            raise UsageError(f"{output} holds runs with another {' and '.join(differing)}: give another --output.")
    else:
        output.mkdir(parents=True, exist_ok=True)
        with atomic_file(path) as file:
            file.write_text(json.dumps(settings, indent=2))


class Case(DistillationCLI):
    """A module, its data and its Trainer, from a list of arguments."""

    def __init__(self, arguments: list[str], callbacks: Sequence[Callback] = ()) -> None:
        flags = {**QUIET, "enable_progress_bar": False, "callbacks": list(callbacks), "enable_checkpointing": True}
        super().__init__(args=arguments, run=False, save_config_callback=None, trainer_defaults=flags)

    def parse_arguments(self, parser: Any, args: Any) -> None:
        """Parse these arguments, not those of the process."""
        self.config = parser.parse_args(args)


class Progress(Callback):
    """Move a bar of runs by a share of one.

    Args:
        bar: counts runs.
        share: how much of a run is done, asked after each batch.
    """

    def __init__(self, bar: tqdm, share: Callable[[Trainer], float]) -> None:
        self.bar = bar
        self.share = share
        self.moved = 0.0

    def on_train_batch_end(self, trainer: Trainer, *_: Any) -> None:
        """Move it."""
        share = min(1.0, self.share(trainer))
        self.bar.update(share - self.moved)
        self.moved = share


def share_out(output: Path, names: Sequence[tuple[str, int]], run: Callable[[Path, str, int, tqdm], None]) -> None:
    """Do all runs that are not done: first those that nobody works on, then those that somebody else has not finished.

    Args:
        output: folder of the runs.
        names: name and seed of each.
        run: called with a folder, which no other process has meanwhile, name, seed, and a bar to be moved by 1; it
            returns at once where the run is done.
    """
    look = "{desc} {percentage:3.1f}% |{bar}| {n:.2f}/{total} {remaining}{postfix}"
    with tqdm(total=len(names), desc="Runs", bar_format=look) as bar:
        missing = list(names)
        for timeout in (0, -1):
            for name, seed in list(missing):
                folder = output / name / f"seed{seed}"
                folder.mkdir(parents=True, exist_ok=True)
                try:
                    with FileLock(folder / ".lock", timeout=timeout):
                        run(folder, name, seed, bar)
                    missing.remove((name, seed))
                except Timeout:
                    continue


def markdown(heading: list[str], rows: list[list[str]]) -> list[str]:
    """The lines of a table."""
    return [f"| {' | '.join(row)} |" for row in (heading, ["---"] * len(heading), *rows)]


def spread(values: list[float]) -> str:
    """Mean and standard deviation of those seeds that have the figure: an empty answer has no bigrams."""
    known = [value for value in values if not math.isnan(value)]
    missing = f" ({len(known)} of {len(values)} seeds)" if len(known) < len(values) else ""
    if len(known) < 2:
        return f"{known[0]:.3f}{missing}" if known else "none"
    return f"{statistics.fmean(known):.3f} ± {statistics.stdev(known):.3f}{missing}"


def difference(values: list[float], reference: list[float]) -> str:
    """Mean and 95 % interval (Student's t) of what seeds differ by, those where both have the figure.

    In bold where the interval leaves out 0.
    """
    differences = [value - other for value, other in zip(values, reference, strict=True)]
    differences = [value for value in differences if not math.isnan(value)]
    if len(differences) < 2:
        return "none"
    mean = statistics.fmean(differences)
    half = student_t.ppf(0.975, len(differences) - 1) * statistics.stdev(differences) / len(differences) ** 0.5
    text = f"{mean:+.3f} ({mean - half:+.3f} to {mean + half:+.3f})"
    return f"**{text}**" if abs(mean) > half else text
