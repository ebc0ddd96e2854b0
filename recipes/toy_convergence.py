"""The toy study of arXiv 2404.02657: what FKL, RKL and AKL learn of a small distribution, and in which order.

    python recipes/toy_convergence.py
    python recipes/toy_convergence.py --learning_rate 3 --output runs/slow

A student with a logit per token starts from the uniform distribution and follows the gradient. Two claims are looked
at: FKL and RKL both arrive at the teacher; on the way FKL learns the head first and RKL the tail. "First" is measured
as the head's share of all error removed so far, which does not depend on who is faster: steps of FKL and of RKL differ
in size, and the faster one is often ahead in head and tail alike. Under Adam, which makes steps of one size for every
token, the order all but vanishes from this start.
"""

from pathlib import Path

import torch
from jsonargparse import auto_cli
from matplotlib.figure import Figure
from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table
from torch import Tensor

from akl_lightning.checkpoint import free_path
from akl_lightning.cli import run_command
from akl_lightning.divergences import AdaptiveKL, Divergence, ForwardKL, ReverseKL
from akl_lightning.errors import UsageError
from akl_lightning.functional import head_tail_gap

TOKENS = 100
DIVERGENCES: dict[str, Divergence] = {"FKL": ForwardKL(), "RKL": ReverseKL(), "AKL": AdaptiveKL()}
COLOURS = {"FKL": "#0072b2", "RKL": "#d55e00", "AKL": "#009e73"}


def main(
    steps: int = 300,
    learning_rate: float = 10.0,
    shown: tuple[int, ...] = (1, 5, 10, 300),
    output: Path = Path("runs/toy_convergence"),
) -> None:
    """Print the table and draw the figure.

    Args:
        steps: steps of gradient descent.
        learning_rate: of gradient descent on the logits.
        shown: steps after which the students are shown.
        output: file of the figure, without its suffix; where there is one already, -v1 is added.
    """
    if not shown or not all(1 <= step <= steps for step in shown):
        raise UsageError(f"shown = {list(shown)} must name steps between 1 and steps = {steps}.")
    if not learning_rate > 0:
        raise UsageError(f"learning_rate must be positive, got {learning_rate}.")
    runs = {
        shape: {name: descend(teacher, divergence, steps, learning_rate) for name, divergence in DIVERGENCES.items()}
        for shape, teacher in teachers().items()
    }
    Console(width=120).print(tabulate(runs, shown))
    path = free_path(output.with_name(f"{output.name}.png"))
    path.parent.mkdir(parents=True, exist_ok=True)
    draw(runs, shown).savefig(path, dpi=150)
    print(f"Figure: {path}")


def teachers() -> dict[str, Tensor]:
    """Distributions ``[tokens]``: one and two humps on a floor of a thousandth of their height, and a Zipf tail."""
    token = torch.arange(TOKENS, dtype=torch.float64)

    def hump(centre: float, width: float) -> Tensor:
        return torch.exp(-0.5 * ((token - centre) / width) ** 2)

    shapes = {
        "one hump": hump(40, 6) + 1e-3,
        "two humps": hump(30, 5) + 0.7 * hump(68, 4) + 1e-3,
        "long tail": 1 / (token + 1),
    }
    return {name: shape / shape.sum() for name, shape in shapes.items()}


def descend(teacher: Tensor, divergence: Divergence, steps: int, learning_rate: float) -> Tensor:
    """The student's distribution before the first step and after each, ``[1 + steps, tokens]``."""
    logits = torch.zeros_like(teacher).requires_grad_()
    optimizer = torch.optim.SGD([logits], learning_rate)
    students = [logits.detach().softmax(-1)]
    for _ in range(steps):
        optimizer.zero_grad()
        divergence(logits, teacher.log()).backward()
        optimizer.step()
        students.append(logits.detach().softmax(-1))
    return torch.stack(students)


def errors(students: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Head error, tail error, and the head's share of the error removed since the start, each ``[1 + steps]``."""
    head, tail = head_tail_gap(students, teacher.expand_as(students))
    removed = (head[0] - head) + (tail[0] - tail)
    return head, tail, (head[0] - head) / removed


def tabulate(runs: dict[str, dict[str, Tensor]], shown: tuple[int, ...]) -> Table:
    table = Table(title=f"Gradient descent from the uniform distribution over {TOKENS} tokens", box=SIMPLE)
    table.title_justify = "left"
    for heading in ("teacher", "loss", "steps", "head error", "tail error", "head's share of error removed"):
        table.add_column(heading, justify="left" if heading in ("teacher", "loss") else "right", no_wrap=True)
    for shape, students in runs.items():
        for step in shown:
            for name, students_ in students.items():
                figures = [f"{values[step]:.4f}" for values in errors(students_, teachers()[shape])]
                table.add_row(shape, name, str(step), *figures)
        table.add_section()
    return table


def draw(runs: dict[str, dict[str, Tensor]], shown: tuple[int, ...]) -> Figure:
    """A row per teacher: the distributions after the steps shown, then head and tail error against steps."""
    figure = Figure(figsize=(3 * (len(shown) + 1.4), 2.7 * len(runs)), layout="constrained", facecolor="white")
    grid = figure.subplots(len(runs), len(shown) + 1, squeeze=False, width_ratios=[1] * len(shown) + [1.4])
    for row, (shape, students) in zip(grid, runs.items(), strict=True):
        teacher = teachers()[shape]
        for axes, step in zip(row, shown, strict=False):
            axes.fill_between(range(TOKENS), teacher, color="0.85", label="teacher")
            for name, students_ in students.items():
                axes.plot(students_[step], color=COLOURS[name], label=name, lw=1.2)
            limits = (0.5 * teacher.min(), 8 * teacher.max())
            axes.set(title=f"{shape}, {step} step{'s' * (step > 1)}", xlabel="token", yscale="log", ylim=limits)
        row[0].set_ylabel("probability")
        row[0].legend(frameon=False, fontsize="x-small", loc="upper right")
        for name, students_ in students.items():
            head, tail, _ = errors(students_, teacher)
            row[-1].plot(range(1, len(head)), head[1:], color=COLOURS[name], label=f"{name}, head")
            row[-1].plot(range(1, len(tail)), tail[1:], color=COLOURS[name], ls="--", label=f"{name}, tail")
        row[-1].set(title="head and tail error", xlabel="step", ylabel="sum of |p - q|", yscale="log", xscale="log")
        row[-1].grid(alpha=0.3)
        row[-1].legend(frameon=False, fontsize="x-small", ncols=2)
    return figure


if __name__ == "__main__":
    run_command(lambda: auto_cli(main))
