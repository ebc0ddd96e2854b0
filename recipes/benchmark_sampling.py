"""How fast rollouts are sampled, against transformers' own generate on the same prompts.

    python recipes/benchmark_sampling.py                  # a small GPT-2 on a CPU: 64 prompts, 48 new tokens
    python recipes/benchmark_sampling.py --device cuda    # a student of 0.5B: 256 prompts, 256 new tokens

Models have new weights, and no response ends before its last token, so that everybody samples the same number. On CUDA
the baseline is a loop over batches of 32, and it is shown, too, what a training step costs apart from sampling: on
rollouts, and off-policy on the same tokens. Rounds take turns; medians are shown. Nothing is downloaded.
"""

import statistics
import time
from collections.abc import Callable
from typing import Any, Literal

import torch
from jsonargparse import auto_cli
from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table
from transformers import AutoModelForCausalLM, GPT2Config, PreTrainedModel, Qwen2Config

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
        rounds: of each contender, after one that is not counted.
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

    contenders: dict[str, Callable[[], Any]] = {
        f"generate, {at_a_time} at a time": lambda: own_generate(model, asked, new_tokens, at_a_time)
    }
    engines: dict[str, Engine] = {"GenerateEngine": GenerateEngine()}
    if on_cuda:
        engines["ContinuousBatching"] = ContinuousBatching(memory)
    for name, engine in engines.items():
        engine.refresh(weights)
        contenders[name] = lambda engine=engine: engine.generate(asked, Sampling(new_tokens), range(len(asked)))
    with torch.no_grad():
        seconds = measured(contenders, rounds, device)
    console, table = Console(), new_table(("sampling", "seconds", "tokens a second", "× generate"))
    first = next(iter(seconds.values()))
    for name, took in seconds.items():
        table.add_row(name, f"{took:.2f}", f"{prompts * new_tokens / took:,.0f}", f"{first / took:.2f}")
    console.print(
        f"{prompts} prompts of 16 to 127 tokens, {new_tokens} new tokens each, {torch.get_num_threads()} threads"
    )
    console.print(table)
    steps = training_steps(model, asked, new_tokens)
    table = new_table(("training part of a step, 16 samples", "seconds", "× off-policy"))
    seconds = measured(steps, rounds, device)
    first = next(iter(seconds.values()))
    for name, took in seconds.items():
        table.add_row(name, f"{took:.3f}", f"{took / first:.2f}")
    console.print(table)


def own_generate(model: PreTrainedModel, asked: list[list[int]], new_tokens: int, at_a_time: int) -> None:
    """What one writes without this package: batches in the order of the prompts, padded on the left."""
    for start in range(0, len(asked), at_a_time):
        rows = asked[start : start + at_a_time]
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
    positions, labels = criterion.response_positions(batch["labels"])
    new = rollout_tokens(rows, type("Found", (), {"positions": positions})(), batch["labels"], 0.5)  # type: ignore[arg-type]
    at = {name: batch[name].to(model.device) for name in ("input_ids", "attention_mask", "labels")}
    positions, labels, alpha = (tensor.to(model.device) for tensor in (positions, labels, new.alpha))

    def step(alpha: torch.Tensor | None) -> None:
        with torch.no_grad():
            teacher = split(at, positions)
        criterion(split(at, positions), teacher, labels, alpha).loss.backward()
        model.zero_grad()

    return {"off-policy": lambda: step(None), "on rollouts": lambda: step(alpha)}


def measured(contenders: dict[str, Callable[[], Any]], rounds: int, device: str) -> dict[str, float]:
    """Median seconds of each; they take turns."""
    took: dict[str, list[float]] = {name: [] for name in contenders}
    for number in range(rounds + 1):
        for name, run in contenders.items():
            if device == "cuda":
                torch.cuda.synchronize()
            begun = time.perf_counter()
            run()
            if device == "cuda":
                torch.cuda.synchronize()
            if number:
                took[name].append(time.perf_counter() - begun)
    return {name: statistics.median(of) for name, of in took.items()}


def new_table(headings: tuple[str, ...]) -> Table:
    table = Table(box=SIMPLE, pad_edge=False)
    for number, heading in enumerate(headings):
        table.add_column(heading, justify="right" if number else "left")
    return table


if __name__ == "__main__":
    run_command(lambda: auto_cli(main, as_positional=False))
