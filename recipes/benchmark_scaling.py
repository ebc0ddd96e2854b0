"""Speed and memory of distillation on several processes, sharded (fsdp2) and not (ddp).

    python recipes/benchmark_scaling.py
    python recipes/benchmark_scaling.py --processes [1,2,4] --teacher_layers 24 --accelerator gpu

Student and teacher are Llama-shaped, with random weights. Every process has a share of the same global batch, so that
the work of a step is the same in every row. On a CPU the processes share its cores: there, look at the memory.
"""

import json
import os
import socket
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from jsonargparse import auto_cli
from lightning.pytorch import Callback, Trainer
from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table
from torch.distributed.tensor import DTensor
from tqdm import tqdm
from transformers import AutoModelForCausalLM, LlamaConfig

from akl_lightning.module import DistillationModule

MIB = 2**20
HEADINGS = ("processes", "strategy", "tokens / s", "spread", "peak MiB", "teacher MiB", "student MiB", "optimizer MiB")


def main(
    processes: tuple[int, ...] = (1, 2),
    strategies: tuple[str, ...] = ("ddp", "fsdp2"),
    teacher_layers: int = 12,
    student_layers: int = 4,
    hidden_size: int = 512,
    vocab_size: int = 32000,
    global_batch_size: int = 4,
    length: int = 128,
    steps: int = 6,
    accelerator: str = "cpu",
) -> None:
    """Print the table.

    Args:
        processes: numbers of processes.
        strategies: how they share the work.
        teacher_layers: of the teacher.
        student_layers: of the student.
        hidden_size: of both.
        vocab_size: of both.
        global_batch_size: samples of an optimizer step over all processes.
        length: tokens of a sample, half of them response tokens.
        steps: timed optimizer steps, after two that are not.
        accelerator: of the Trainer.
    """
    title = (
        f"Llama-shaped, hidden size {hidden_size}, teacher of {teacher_layers} layers, student of {student_layers}, "
        f"{global_batch_size} samples of {length} tokens a step; figures per process; torch {torch.__version__}"
    )
    table = Table(title=title, title_justify="left", box=SIMPLE)
    for heading in HEADINGS:
        table.add_column(heading, justify="left" if heading == "strategy" else "right", no_wrap=True)
    with tempfile.TemporaryDirectory() as folder:
        shape = {
            "vocab_size": vocab_size, "hidden_size": hidden_size, "intermediate_size": 3 * hidden_size,
            "num_attention_heads": 8, "num_key_value_heads": 8, "max_position_embeddings": length,
        }  # fmt: skip
        for name, layers in (("teacher", teacher_layers), ("student", student_layers)):
            config = LlamaConfig(**shape, num_hidden_layers=layers)
            AutoModelForCausalLM.from_config(config).save_pretrained(Path(folder) / name)
        cases = [(count, strategy) for count in processes for strategy in strategies]
        for count, strategy in tqdm(cases, unit="case"):
            with socket.socket() as probe:
                probe.bind(("127.0.0.1", 0))
                port = probe.getsockname()[1]
            job = (count, port, folder, strategy, accelerator, global_batch_size // count, length, vocab_size, steps)
            torch.multiprocessing.spawn(work, job, nprocs=count)
            found = [json.loads((Path(folder) / f"{rank}.json").read_text()) for rank in range(count)]
            rates = [global_batch_size * (length // 2) / seconds for seconds in found[0]["seconds"]]
            row = [str(count), strategy, f"{statistics.median(rates):,.0f}", f"{min(rates):,.0f} to {max(rates):,.0f}"]
            for figure in ("peak", "teacher", "student", "optimizer"):
                row.append(f"{max(one[figure] for one in found) / MIB:,.0f}")
            table.add_row(*row)
    Console(width=120).print(table)


class Clock(Callback):
    """When each batch was over."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def on_train_batch_end(self, *_: Any) -> None:
        self.times.append(time.perf_counter())


def work(
    rank: int,
    count: int,
    port: int,
    folder: str,
    strategy: str,
    accelerator: str,
    batch_size: int,
    length: int,
    vocab_size: int,
    steps: int,
) -> None:
    """One process: train, and leave figures in ``{rank}.json``."""
    ranks = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": count, "LOCAL_WORLD_SIZE": count, "GROUP_RANK": 0}
    address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "TORCHELASTIC_RUN_ID": "benchmark"}
    os.environ.update({name: str(value) for name, value in (ranks | address).items()})
    torch.set_num_threads(max(1, (os.cpu_count() or 1) // count))
    clock, quiet = Clock(), ("logger", "enable_checkpointing", "enable_model_summary", "enable_progress_bar")
    trainer = Trainer(
        accelerator=accelerator,
        devices=count,
        strategy=strategy,
        max_epochs=1,
        callbacks=[clock],
        use_distributed_sampler=False,
        **dict.fromkeys(quiet, False),
    )
    module = DistillationModule(f"{folder}/student", f"{folder}/teacher")
    ids = torch.randint(vocab_size, (batch_size, length))
    labels = ids.clone()
    labels[:, : length - length // 2] = -100
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}
    trainer.fit(module, torch.utils.data.DataLoader([batch] * (2 + steps), batch_size=None))
    states = [state for of in trainer.optimizers[0].state.values() for state in of.values()]
    assert module.teacher is not None
    peak = torch.cuda.max_memory_allocated() if accelerator == "gpu" else resident_peak()
    figures = {
        "seconds": [end - start for start, end in zip(clock.times[1:], clock.times[2:], strict=False)],
        "peak": peak,
        "teacher": held(module.teacher.model.parameters()),
        "student": held(module.parameters()),
        "optimizer": held(states),
    }
    (Path(folder) / f"{rank}.json").write_text(json.dumps(figures))


def held(tensors: Any) -> int:
    """Bytes of tensors in this process."""
    return sum((t.to_local() if isinstance(t, DTensor) else t).nbytes for t in tensors)


def resident_peak() -> int:
    (line,) = [line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM:")]
    return int(line.split()[1]) * 1024


if __name__ == "__main__":
    auto_cli(main)
