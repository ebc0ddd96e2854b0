"""What AKL costs on a GPU, how exact it is, and what share of a training step it takes.

    python recipes/benchmark_criterion.py --device cuda              # this; about four minutes on an H100
    python recipes/benchmark_criterion.py --device cuda --quick true # the three main rows, fewer rounds

Everything is bfloat16 and in one process, timed by events: medians, and the spread. The floor is the four matrix
products that nobody can avoid, with heads padded to a multiple of 64 rows. Nothing is downloaded; the models of the
training step have the shapes of a 0.5B and a 1.5B Qwen2 and random weights, with heads scaled so that the teacher is as
sure of itself as a language model. Liger-Kernel takes part where it is installed.
"""

import gc
import importlib.util
import statistics
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from lightning.pytorch import Callback, Trainer
from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, Qwen2Config

from akl_lightning import functional as F
from akl_lightning.criterion import DistillationCriterion
from akl_lightning.divergences import AdaptiveKL, Divergence, ForwardKL, JensenShannon, SkewKL
from akl_lightning.kernels.classes import Classes
from akl_lightning.module import DistillationModule
from akl_lightning.projection import Merged, Projection

SHAPES = {(151936, 896, 3584): 8192, (128256, 2048, 4096): 8192, (50257, 768, 1600): 4096}
"""Vocabulary, hidden size of student and of teacher; tokens of the main row."""

MORE_TOKENS = (1024, 16384)
FLOOR_ROWS = 2048
MIB = 2**20
HAS_LIGER = importlib.util.find_spec("liger_kernel") is not None

Inputs = dict[str, Any]
Run = Callable[[], None]


def main(quick: bool, rounds: int, console: Console) -> None:
    """Print the tables.

    Args:
        quick: the main rows alone.
        rounds: timed rounds, after two that are not.
        console: where to.
    """
    torch.backends.cuda.matmul.allow_tf32 = False
    name = torch.cuda.get_device_name()
    console.print(f"{name}, torch {torch.__version__}; a copy moves {copy_bandwidth():.2f} TB/s, read and written")
    table = new_table(
        f"Criterion, forward and backward, bfloat16: medians of {rounds} rounds",
        ("vocabulary", "hidden", "tokens", "contender", "ms", "spread", "× floor", "MiB above"),
    )
    for shape, main_tokens in SHAPES.items():
        for tokens in (main_tokens,) if quick else (main_tokens, *MORE_TOKENS):
            rows(table, shape, tokens, rounds, CONTENDERS if tokens == main_tokens else {"floor": floor, **OURS})
    console.print(table)
    console.print(accuracy_table())
    console.print(step_table(rounds))


def new_table(title: str, headings: tuple[str, ...]) -> Table:
    table = Table(title=title, title_justify="left", box=SIMPLE)
    for heading in headings:
        table.add_column(heading, justify="left" if heading in ("contender", "step") else "right", no_wrap=True)
    return table


def copy_bandwidth() -> float:
    """TB/s that a copy within the GPU's memory reads and writes."""
    source = torch.empty(2**31, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    taken = timed(lambda: target.copy_(source), 5)
    return 2 * source.numel() / statistics.median(taken) / 1e9


def timed(run: Run, rounds: int) -> list[float]:
    """Milliseconds of each round."""
    times = []
    for _ in range(rounds):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        run()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end))
    return times


# --------------------------------------------------------------------------------------------------------------------
# The criterion alone


def rows(
    table: Table, shape: tuple[int, int, int], tokens: int, rounds: int, contenders: dict[str, Callable[[Inputs], Run]]
) -> None:
    """Measure every contender at one size."""
    vocab, hidden, teacher_hidden = shape
    data, floor_time = inputs(vocab, hidden, teacher_hidden, tokens), 1.0
    for name, make in contenders.items():
        row = [f"{vocab:,}", f"{hidden:,} × {teacher_hidden:,}", f"{tokens:,}", name]
        try:
            times, memory = measure(make(data), data, rounds)
        except torch.cuda.OutOfMemoryError:
            table.add_row(*row, "-", "does not fit")
            continue
        median = statistics.median(times)
        floor_time = median if name == "floor" else floor_time
        spread = f"{min(times):.1f} to {max(times):.1f}"
        table.add_row(*row, f"{median:.1f}", spread, f"{median / floor_time:.2f}", f"{memory / MIB:,.0f}")
    table.add_section()


def inputs(vocab: int, hidden: int, teacher_hidden: int, tokens: int, dtype: torch.dtype = torch.bfloat16) -> Inputs:
    """A teacher whose head is a few tokens, as a language model's is, and a student that agrees with it at most."""
    generator = torch.Generator("cuda").manual_seed(0)

    def drawn(*shape: int) -> Tensor:
        return torch.randn(*shape, device="cuda", generator=generator)

    labels = torch.randint(0, vocab, (tokens,), device="cuda", generator=generator)
    sides: Inputs = {}
    for side, size in (("student", hidden), ("teacher", teacher_hidden)):
        weight = drawn(vocab, size) * 0.06 * (576 / size) ** 0.5
        # Logits are noise of the size of a language model's, and a peak at the label.
        peak = (8 + 10 * torch.rand(tokens, 1, device="cuda", generator=generator)) * 0.06**2 * 576
        states = 2 * drawn(tokens, size) + weight[labels] * peak / weight[0].square().sum()
        head = nn.Linear(size, vocab, bias=False, device="cuda", dtype=dtype)
        head.weight.data.copy_(weight)
        sides[side], sides[f"{side} head"] = states.to(dtype), head
    sides["student"].requires_grad_()
    sides["teacher head"].requires_grad_(False)
    return {**sides, "labels": labels}


def forget_gradients(data: Inputs) -> None:
    data["student"].grad = data["student head"].weight.grad = None


def measure(run: Run, data: Inputs, rounds: int) -> tuple[list[float], int]:
    """Milliseconds of each round, and the peak of bytes above inputs and gradients."""

    def once() -> None:
        run()
        forget_gradients(data)

    forget_gradients(data)
    once()
    once()
    gc.collect()
    torch.cuda.empty_cache()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    times = timed(once, rounds)
    gradients = sum(of.numel() * of.element_size() for of in (data["student"], data["student head"].weight))
    return times, torch.cuda.max_memory_allocated() - before - gradients


def ours(divergence: Divergence, data: Inputs, alpha: float = 0.5) -> Run:
    criterion = DistillationCriterion(divergence, alpha)

    def run() -> None:
        student = Projection(data["student"], data["student head"])
        criterion(student, Projection(data["teacher"], data["teacher head"]), data["labels"]).loss.backward()

    return run


def class_maps(vocab: int, others: int) -> tuple[Tensor, Tensor]:
    """The classes of each output of a student and of a teacher, about as those of GPT-2 and SmolLM2.

    Three quarters of the outputs are alone in their class; most other classes are small, and one has several thousand.
    """
    generator = torch.Generator().manual_seed(0)
    alone, several = 3 * min(vocab, others) // 4, 2 * min(vocab, others) // 25
    maps = []
    for outputs, largest in ((vocab, vocab // 12), (others, others // 16)):
        more = several * torch.rand(outputs - alone - several - largest, generator=generator).square()
        parts = [torch.arange(alone + several), torch.full((largest,), alone + several - 1), alone + more.long()]
        maps.append(torch.cat(parts)[torch.randperm(outputs, generator=generator)])
    return maps[0], maps[1]


def in_classes(divergence: Divergence, data: Inputs) -> Run:
    """A teacher over another vocabulary; each of its outputs is like one of the student's in the same class."""
    head = data["teacher head"].weight
    of_student, of_teacher = class_maps(len(head), 49 * len(head) // 50)
    like = torch.empty(int(of_student.max()) + 1, dtype=torch.long)
    like[of_student] = torch.arange(len(of_student))
    teacher = nn.Linear(head.shape[1], len(of_teacher), bias=False, device=head.device, dtype=head.dtype)
    teacher.requires_grad_(False).weight.copy_(head[like[of_teacher]])
    classes = Classes(of_student, of_teacher, len(like)).to(head.device)
    criterion = DistillationCriterion(divergence)

    def run() -> None:
        student = Projection(data["student"], data["student head"])
        there = Merged(Projection(data["teacher"], teacher), classes)
        criterion(student, there, data["labels"]).loss.backward()

    return run


def floor(data: Inputs) -> Run:
    hidden, teacher_hidden = data["student"].detach(), data["teacher"]
    vocab = len(data["student head"].weight)
    weight, teacher_weight = (
        nn.functional.pad(data[f"{side} head"].weight.detach(), (0, 0, 0, -vocab % 64))
        for side in ("student", "teacher")
    )

    def run() -> None:
        logits, teacher_logits = hidden.new_empty(2, FLOOR_ROWS, len(weight))
        of_hidden, of_weight = torch.empty_like(hidden), torch.zeros_like(weight)
        for start in range(0, len(hidden), FLOOR_ROWS):
            chunk = hidden[start : start + FLOOR_ROWS]
            mine = logits[: len(chunk)]
            torch.mm(chunk, weight.T, out=mine)
            torch.mm(teacher_hidden[start : start + FLOOR_ROWS], teacher_weight.T, out=teacher_logits[: len(chunk)])
            torch.mm(mine, weight, out=of_hidden[start : start + FLOOR_ROWS])
            of_weight.addmm_(mine.T, chunk)

    return run


class Hellinger(Divergence):
    """A divergence of a user's own, which gives nothing but its value."""

    def compare(self, student: Tensor, teacher: Tensor) -> Tensor:
        return 1 - (0.5 * (student + teacher)).exp().sum(-1)


def liger_chunked(data: Inputs) -> Run:
    from liger_kernel.chunked_loss import LigerFusedLinearJSDLoss

    loss = LigerFusedLinearJSDLoss(beta=0.0, chunk_size=1024)  # beta = 0 is forward KL

    def run() -> None:
        heads = data["student head"].weight, data["teacher head"].weight
        loss(data["student"], heads[0], data["teacher"], heads[1], data["labels"]).backward()

    return run


def liger_fused_jsd(data: Inputs) -> Run:
    from liger_kernel.transformers import LigerFusedLinearJSD

    loss = LigerFusedLinearJSD(jsd_beta=0.5)

    def run() -> None:
        heads = data["student head"].weight, data["teacher head"].weight
        loss(data["student"], heads[0], data["teacher"], heads[1], data["labels"]).backward()

    return run


def liger_kl(data: Inputs) -> Run:
    from liger_kernel.transformers import LigerKLDIVLoss

    loss = LigerKLDIVLoss(reduction="batchmean", log_target=True)

    def run() -> None:
        with torch.no_grad():
            log_p = data["teacher head"](data["teacher"]).float().log_softmax(-1)
        loss(data["student head"](data["student"]).float().log_softmax(-1), log_p).backward()

    return run


def textbook(data: Inputs) -> Run:
    """AKL as the authors publish it: dense, and the teacher's whole vocabulary sorted."""

    def run() -> None:
        logits = data["student head"](data["student"]).float()
        with torch.no_grad():
            teacher_logits = data["teacher head"](data["teacher"]).float()
        p, q = teacher_logits.softmax(-1), logits.softmax(-1)
        ordered, order = p.sort(descending=True)
        gap = (p - q).abs().detach().gather(-1, order)
        in_head = ordered.cumsum(-1) - ordered < 0.5
        head_gap, tail_gap = (gap * in_head).sum(-1), (gap * ~in_head).sum(-1)
        del ordered, order, gap, in_head
        log_p, log_q = teacher_logits.log_softmax(-1), logits.log_softmax(-1)
        weight = head_gap / (head_gap + tail_gap)
        akl = weight * (p * (log_p - log_q)).sum(-1) + (1 - weight) * (q * (log_q - log_p)).sum(-1)
        cross_entropy = nn.functional.cross_entropy(logits, data["labels"], reduction="none")
        (0.5 * akl + 0.5 * cross_entropy).sum().backward()

    return run


OURS: dict[str, Callable[[Inputs], Run]] = {
    "AKL": partial(ours, AdaptiveKL()),
    "AKL in classes": partial(in_classes, AdaptiveKL()),
}
CONTENDERS: dict[str, Callable[[Inputs], Run]] = {
    "floor": floor,
    **OURS,
    "FKL": partial(ours, ForwardKL()),
    "Jensen-Shannon": partial(ours, JensenShannon()),
    "skewed FKL": partial(ours, SkewKL()),
    "a user's own (Hellinger)": partial(ours, Hellinger()),
    **(
        {
            "Liger chunked FKL, compiled": liger_chunked,
            "Liger fused linear JSD": liger_fused_jsd,
            "Liger KL, dense logits": liger_kl,
        }
        if HAS_LIGER
        else {}
    ),
    "textbook AKL (sort, dense)": textbook,
}


# --------------------------------------------------------------------------------------------------------------------
# How exact it is


def accuracy_table() -> Table:
    """Relative error of loss and gradients against float64 from the same bfloat16 inputs, student near the teacher."""
    table = new_table(
        "Error against float64 from the same inputs: vocabulary 50,257, hidden size 768, 256 tokens, alpha 1",
        ("noise", "loss, float64", "loss", "of hidden states", "of the head"),
    )
    for noise in (0.05, 0.3, 1.0):
        data = inputs(50257, 768, 768, 256)
        data["student head"].weight.data.copy_(data["teacher head"].weight)
        data["teacher"] = data["student"].detach().clone()
        data["student"].data.add_(noise * torch.randn_like(data["student"]))
        hidden, weight = (
            of.detach().double().requires_grad_() for of in (data["student"], data["student head"].weight)
        )
        teacher_logits = data["teacher"].double() @ data["teacher head"].weight.double().T
        loss = F.adaptive_kl(hidden @ weight.T, teacher_logits).sum()
        loss.backward()
        criterion = DistillationCriterion(AdaptiveKL(), alpha=1.0)
        student = Projection(data["student"], data["student head"])
        output = criterion(student, Projection(data["teacher"], data["teacher head"]), data["labels"])
        output.loss.backward()
        errors = [
            ((ours.grad.double() - exact.grad).norm() / exact.grad.norm()).item()
            for ours, exact in ((data["student"], hidden), (data["student head"].weight, weight))
        ]
        table.add_row(f"{noise}", f"{loss.item():.4f}", f"{output.loss.item():.4f}", *(f"{e:.4f}" for e in errors))
    return table


# --------------------------------------------------------------------------------------------------------------------
# The whole step


class Clock(Callback):
    """Events at the end of each batch, and around the criterion."""

    def __init__(self, criterion: nn.Module) -> None:
        self.ends: list[Any] = []
        self.around: list[Any] = []
        criterion.register_forward_pre_hook(lambda *_: self.around.append(now()))
        criterion.register_forward_hook(lambda *_: self.around.append(now()))

    def on_train_batch_end(self, *_: Any) -> None:
        self.ends.append(now())


def now() -> Any:
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def step_table(rounds: int) -> Table:
    """A student of 0.5B parameters learns from a teacher of 1.5B: milliseconds of a step, and the criterion's share."""
    teacher = language_model(28, 1536, 8960, 12, torch.bfloat16)
    student = language_model(24, 896, 4864, 14, torch.float32)
    module = DistillationModule(student, teacher, optimizer=partial(torch.optim.AdamW, lr=1e-5, fused=True))
    clock = Clock(module.criterion)
    quiet = dict.fromkeys(("logger", "enable_checkpointing", "enable_model_summary", "enable_progress_bar"), False)
    trainer = Trainer(
        accelerator="gpu", devices=1, precision="bf16-mixed", max_steps=3 + rounds, callbacks=[clock], **quiet
    )
    trainer.fit(module, torch.utils.data.DataLoader(list(batches(3 + rounds)), batch_size=None))
    torch.cuda.synchronize()
    steps = [start.elapsed_time(end) for start, end in zip(clock.ends[2:], clock.ends[3:], strict=False)]
    inside = [start.elapsed_time(end) for start, end in zip(clock.around[6::2], clock.around[7::2], strict=False)]
    table = new_table(
        "Training step: 0.5B student from 1.5B teacher, bf16-mixed, 8,192 positions, 6,144 response tokens",
        ("step", "ms", "spread", "share"),
    )
    whole = statistics.median(steps)
    for name, values in (("whole", steps), ("of that, the criterion", inside)):
        median = statistics.median(values)
        table.add_row(name, f"{median:.0f}", f"{min(values):.0f} to {max(values):.0f}", f"{median / whole:.1%}")
    return table


def language_model(layers: int, hidden: int, intermediate: int, heads: int, dtype: torch.dtype) -> nn.Module:
    config = Qwen2Config(
        vocab_size=151936, hidden_size=hidden, intermediate_size=intermediate, num_hidden_layers=layers,
        num_attention_heads=heads, num_key_value_heads=2, max_position_embeddings=1024, tie_word_embeddings=True,
    )  # fmt: skip
    with torch.device("cuda"):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    with torch.no_grad():
        model.lm_head.weight.mul_(8)
    return model


def batches(count: int) -> Iterator[dict[str, Tensor]]:
    for _ in range(count):
        ids = torch.randint(0, 151936, (16, 512))
        labels = ids.clone()
        labels[:, : 512 - 384] = -100
        yield {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}
