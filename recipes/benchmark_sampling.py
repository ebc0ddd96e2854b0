"""How fast rollouts are sampled, against transformers' own generate, and what learning from them costs.

    python recipes/benchmark_sampling.py                  # a small GPT-2 on a CPU: 64 prompts, 48 new tokens
    python recipes/benchmark_sampling.py --device cuda    # a student of 0.5B: 256 prompts, 256 new tokens

Models have new weights, and no response ends before its last token, so that everybody samples the same number. The
baseline is generate on batches of 32 (on a CPU 64), of which as many are timed as there are rounds. The last rows are a
training step on 16 samples, sampling apart: off-policy, and on rollouts of the same tokens. Nothing is downloaded.
"""

import statistics
import time
from collections.abc import Callable
from functools import partial
from typing import Any, Literal

import torch
from jsonargparse import auto_cli
from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table
from transformers import AutoModelForCausalLM, GPT2Config, PreTrainedModel, Qwen2Config

from akl_lightning.batch import KEYS, response_of
from akl_lightning.cli import run_command
from akl_lightning.criterion import DistillationCriterion
from akl_lightning.models.split import SplitModel
from akl_lightning.rollouts import ContinuousBatching, Engine, GenerateEngine, Sampling, Weights
from akl_lightning.rollouts.batches import Answer, answered, rollout_tokens

SMALL = GPT2Config(vocab_size=2048, n_layer=2, n_embd=96, n_head=4, n_positions=256, eos_token_id=None)
LARGE = Qwen2Config(
    hidden_size=896, intermediate_size=4864, num_hidden_layers=24, num_attention_heads=14, num_key_value_heads=2,
    tie_word_embeddings=True, eos_token_id=None,
)  # fmt: skip


def main(
    device: Literal["cpu", "cuda"] = "cpu",
    prompts: int | None = None,
    new_tokens: int | None = None,
    rounds: int = 3,
    memory: float = 8.0,
) -> None:
    """Print the table.

    Args:
        device: where.
        prompts: how many; 64 on a CPU, 256 on CUDA.
        new_tokens: of each; 48 on a CPU, 256 on CUDA.
        rounds: of each contender, after one that is not counted; of the generate loop, batches.
        memory: GiB of continuous batching.
    """
    torch.manual_seed(0)
    on_cuda = device == "cuda"
    prompts, new_tokens = prompts or (256 if on_cuda else 64), new_tokens or (256 if on_cuda else 48)
    config = LARGE if on_cuda else SMALL
    model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16 if on_cuda else torch.float32)
    model = model.to(device).eval()
    generator = torch.Generator().manual_seed(0)
    lengths = torch.randint(16, 128, (prompts,), generator=generator).tolist()
    asked = [torch.randint(1, config.vocab_size, (length,), generator=generator).tolist() for length in lengths]
    weights = Weights(SplitModel(model), (config.vocab_size + 1,), 0)  # an end that no token is
    at_a_time = 32 if on_cuda else 64

    engines: dict[str, Engine] = {"GenerateEngine": GenerateEngine(), "ContinuousBatching": ContinuousBatching(memory)}
    table = Table("", "seconds", "least to most", "tokens/s", "× first", box=SIMPLE, pad_edge=False)
    for number, column in enumerate(table.columns):
        column.justify, column.no_wrap = "right" if number else "left", True
    console = Console()
    console.print(
        f"{prompts} prompts of 16 to 127 tokens, {new_tokens} new tokens each; "
        f"{torch.cuda.get_device_name() if on_cuda else f'{torch.get_num_threads()} threads'}"
    )
    with console.status("Sampling") as status, torch.no_grad():
        starts = range(0, max(1, prompts - at_a_time + 1), at_a_time)  # of whole batches
        batches = [asked[start : start + at_a_time] for start in starts]
        chosen = [batches[number % len(batches)] for number in range(rounds)]
        own_generate(model, chosen[0], 4)
        loop = [timed(lambda rows=rows: own_generate(model, rows, new_tokens), device) for rows in chosen]
        first = add(table, f"generate, {len(chosen[0])} prompts", loop, len(chosen[0]) * new_tokens)
        for name, engine in engines.items():
            status.update(name)
            engine.refresh(weights)
            answer = partial(engine.generate, asked, Sampling(new_tokens), range(len(asked)))
            took = [timed(answer, device) for _ in range(rounds + 1)]
            add(table, f"{name}, first call", took[:1], prompts * new_tokens, first)
            add(table, f"{name}, later", took[1:], prompts * new_tokens, first)
            engine.release()
    table.add_section()
    with console.status("Training"):
        first = None
        for name, step in training_steps(model, asked, new_tokens).items():
            took = [timed(step, device) for _ in range(rounds + 1)][1:]
            rate = add(table, f"a training step, {name}", took, 16 * new_tokens, first)
            first = first or rate
    console.print(table)


def timed(work: Callable[[], Any], device: str) -> float:
    """Seconds."""
    if device == "cuda":
        torch.cuda.synchronize()
    begun = time.perf_counter()
    work()
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - begun


def add(table: Table, name: str, took: list[float], tokens: int, first: float | None = None) -> float:
    """Add a row of median and spread, and give back its tokens a second, by the median."""
    middle = statistics.median(took)
    rate = tokens / middle
    table.add_row(
        name, f"{middle:.3f}", f"{min(took):.3f} to {max(took):.3f}", f"{rate:,.0f}", f"{rate / (first or rate):.2f}"
    )
    return rate


def own_generate(model: PreTrainedModel, rows: list[list[int]], new_tokens: int) -> None:
    """What one writes without this package: prompts as they come, padded on the left."""
    longest = max(map(len, rows))
    ids = torch.tensor([[0] * (longest - len(row)) + row for row in rows], device=model.device)
    mask = torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in rows], device=model.device)
    model.generate(
        input_ids=ids, attention_mask=mask, do_sample=True, top_k=0, max_new_tokens=new_tokens, pad_token_id=0
    )


def training_steps(model: PreTrainedModel, asked: list[list[int]], new_tokens: int) -> dict[str, Callable[[], Any]]:
    """Forward and backward of the student and the criterion on the same tokens, as the data's and as rollouts."""
    criterion, split = DistillationCriterion(alpha=0.5), SplitModel(model)
    rows = {row: Answer(prompt, prompt[:1] * new_tokens, True, True) for row, prompt in enumerate(asked[:16])}
    width = max(len(answer.prompt) for answer in rows.values())
    empty = torch.zeros(16, width, dtype=torch.int64)
    batch = {"input_ids": empty, "attention_mask": torch.ones_like(empty), "labels": torch.full_like(empty, -100)}
    batch = answered(batch, rows, 0, -100)
    response = response_of(batch, criterion)
    new = rollout_tokens(batch, response, criterion.alpha)
    at = {name: batch[name].to(model.device) for name in KEYS}
    positions, labels, alpha = (tensor.to(model.device) for tensor in (*response, new.alpha))

    def step(alpha: torch.Tensor | None) -> None:
        with torch.no_grad():
            teacher = split(at, positions)
        criterion(split(at, positions), teacher, labels, alpha).loss.backward()
        model.zero_grad()

    return {"off-policy": lambda: step(None), "on rollouts": lambda: step(alpha)}


if __name__ == "__main__":
    run_command(lambda: auto_cli(main, as_positional=False))
