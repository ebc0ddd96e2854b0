"""Compare divergences: every baseline x several seeds on the same data, with the same budget, from the same start.

    python recipes/compare_divergences.py --teacher TEACHER --output runs/compare_gpt2
    python recipes/compare_divergences.py --setting recipes/compare_smollm2.yaml --train_size 320 --output runs/smollm2
    python recipes/compare_divergences.py --baselines [akl,fkl,rkl] --seeds [0,1,2,3,4] ...

A setting is a configuration file for ``akl fit``; a baseline is another one from ``recipes/baselines``, merged into it.
The teacher is asked once: its hidden states are cached, its greedy answers to the training prompts are SeqKD's data.
Every run is evaluated on the held-out split against the teacher, and by sampled answers.

It goes on where it was killed, in the middle of a run too. Started several times, with the same output, it shares out
the runs; whoever comes last writes the report: ``comparison.md``, ``.csv``, ``.png``, and ``.json`` with every curve.
"""

import csv
import json
import math
import platform
import random
import shutil
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
import yaml
from filelock import FileLock
from jsonargparse import auto_cli
from lightning.pytorch import Callback, LightningModule, Trainer
from matplotlib.figure import Figure
from tqdm import tqdm

from akl_lightning.callbacks import LastCheckpoint
from akl_lightning.checkpoint import atomic_file
from akl_lightning.checkpoint_io import newest_checkpoint
from akl_lightning.cli import run_command
from akl_lightning.criterion import DistillationCriterion
from akl_lightning.data.sources import JsonLines
from akl_lightning.data.splits import split_records
from akl_lightning.errors import UsageError
from akl_lightning.evaluation.answers import read_answers
from akl_lightning.evaluation.decoding import Decoding
from akl_lightning.evaluation.generate import AnswerWriter
from akl_lightning.module import DistillationModule
from akl_lightning.teachers.cache.writer import CacheWriter, write_cache
from common.comparison import QUIET, Case, Progress, difference, markdown, remember, share_out, spread
from common.report import evaluate

RECIPES = Path(__file__).parent
BASELINES = ("akl", "akl_within", "fkl", "rkl", "fkl_rkl", "jensen_shannon", "skew_fkl", "skew_rkl", "sft", "seqkd")
REFERENCE = "akl"
TITLES = {
    "akl": "AKL", "akl_within": "AKL, within", "fkl": "FKL", "rkl": "RKL", "fkl_rkl": "FKL + RKL",
    "jensen_shannon": "Jensen-Shannon", "skew_fkl": "skewed FKL", "skew_rkl": "skewed RKL", "sft": "SFT",
    "seqkd": "SeqKD", "teacher": "teacher",
}  # fmt: skip
COLUMNS = {
    "cross_entropy": "cross entropy", "fkl": "FKL", "rkl": "RKL", "head_error": "head error",
    "tail_error": "tail error", "rouge_l": "ROUGE-L", "distinct_2": "distinct-2", "self_bleu": "self-BLEU",
}  # fmt: skip


def main(
    setting: Path = RECIPES / "compare_gpt2.yaml",
    teacher: str | None = None,
    output: Path = Path("runs/compare_divergences"),
    baselines: Sequence[str] = BASELINES,
    seeds: Sequence[int] = (0, 1, 2),
    train_size: int | None = None,
    decoding: Decoding = Decoding(max_new_tokens=48, seeds=(10, 20, 30, 40, 50)),  # noqa: B008
) -> None:
    """Run what is missing and report.

    Args:
        setting: a configuration file.
        teacher: the teacher, where the setting names none.
        output: folder of runs and report.
        baselines: names of files in ``recipes/baselines``.
        seeds: of new weights and of the order of the samples.
        train_size: pairs to train on, drawn from the setting's; all of them by default.
        decoding: of the held-out answers.
    """
    for name in baselines:
        if not (RECIPES / "baselines" / f"{name}.yaml").is_file():
            raise UsageError(f"there is no baseline {name!r}: use some of {', '.join(BASELINES)}.")
    written = yaml.safe_load(setting.read_text())
    teacher = teacher or written["model"].get("teacher")
    if teacher is None:
        raise UsageError(
            f"{setting} names no teacher: give --teacher, for example the folder gpt2_distill.py speaks of."
        )
    remember(output, {"setting": written, "teacher": teacher, "train_size": train_size, "decoding": asdict(decoding)})

    arguments = ["--config", str(setting), "--model.teacher", teacher, "--data.tokenizer", teacher]
    with FileLock(output / ".prepare.lock"):
        arguments = prepare(output, arguments, teacher, "seqkd" in baselines, train_size, decoding)
    names = [(name, seed) for seed in seeds for name in baselines]
    share_out(output, names, lambda folder, name, seed, bar: run(folder, name, seed, arguments, decoding, bar))
    evaluate_teacher(output / "teacher", teacher, arguments, decoding)
    report(output, setting, names, seeds)


# --------------------------------------------------------------------------------------------------------------------
# Once for all runs


def prepare(
    output: Path, arguments: list[str], teacher: str, with_answers: bool, train_size: int | None, decoding: Decoding
) -> list[str]:
    """Write down the pairs, ask the teacher; arguments that all runs share."""
    folder = output / "data"
    source = ["--data.source", "JsonLines", "--data.source.path", str(folder / "train.jsonl")]
    source += ["--data.source.validation_path", str(folder / "validation.jsonl")]
    source += ["--data.source.test_path", str(folder / "test.jsonl")]
    prepared = [*arguments, *source]
    cached = [*prepared, "--model.teacher", f"cache:{output / 'teacher/cache'}"]
    if (folder / "complete").exists() and (not with_answers or (folder / "seqkd.jsonl").exists()):
        return cached
    if not (folder / "complete").exists():
        data = Case(arguments).datamodule
        splits = split_records(data.source.load(), data.validation_size, data.test_size)
        if train_size is not None:
            count = len(splits["train"])
            splits["train"] = splits["train"].select(random.Random(0).sample(range(count), min(train_size, count)))
        for split, records in splits.items():
            write_lines(folder / f"{split}.jsonl", map(line_of, records))
    data = Case(prepared).datamodule
    cache = CacheWriter(teacher, str(output / "teacher/cache"), codec="bfloat16")
    write_cache(cache, data, Trainer(**QUIET))
    (folder / "complete").touch()
    if with_answers:
        data.predict_split = "train"
        greedy = AnswerWriter(teacher, output / "teacher/train.jsonl", Decoding(decoding.max_new_tokens))
        Trainer(**QUIET).predict(greedy, data, return_predictions=False)
        pairs = (
            {name: answer[name] for name in ("instruction", "input", "messages", "tools", "cut") if name in answer}
            | {"output": answer["answer"]}
            for answer in read_answers(greedy.path)
        )
        write_lines(folder / ".seqkd.jsonl", pairs)
        data.source, data.splits = JsonLines(str(folder / ".seqkd.jsonl")), {}
        data.validation_size = data.test_size = 0
        write_cache(CacheWriter(teacher, str(output / "teacher/cache"), codec="bfloat16"), data, Trainer(**QUIET))
        (folder / ".seqkd.jsonl").rename(folder / "seqkd.jsonl")
    return cached


def line_of(record: dict[str, Any]) -> dict[str, Any]:
    """A record as a line that is read as the same record."""
    if record["text"]:
        return {"text": record["text"]}
    messages = json.loads(record["messages"])
    answered = messages[-1]["role"] == "assistant"
    line = (
        {"prompt": messages[:-1], "completion": record["references"] or messages[-1:]}
        if answered
        else {"prompt": messages}
    )
    return line | ({"tools": json.loads(record["tools"])} if record["tools"] else {}) | {"cut": record["cut"]}


def write_lines(path: Path, lines: Iterable[dict[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_file(path) as file, file.open("w") as written:
        written.writelines(json.dumps(line) + "\n" for line in lines)


# --------------------------------------------------------------------------------------------------------------------
# Runs


class Curve(Callback):
    """Keep the validation means against epochs; a run that goes on goes on with them."""

    def __init__(self) -> None:
        self.points: list[dict[str, float]] = []

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not trainer.sanity_checking:
            batches = trainer.fit_loop.total_batch_idx + 1 if trainer.state.fn == "fit" else 0
            means = {name: value.item() for name, value in trainer.callback_metrics.items() if name.startswith("val/")}
            self.points.append({"epoch": batches / max(1, trainer.num_training_batches), **means})

    def state_dict(self) -> dict[str, Any]:
        return {"points": self.points}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.points = state_dict["points"]


def done(trainer: Trainer) -> float:
    """How much of a run is done."""
    assert trainer.max_epochs
    return (trainer.fit_loop.total_batch_idx + 1) / (trainer.num_training_batches * trainer.max_epochs)


def run(folder: Path, name: str, seed: int, arguments: list[str], decoding: Decoding, bar: tqdm) -> None:
    """Train, test and write ``result.json``, unless it is there; go on from a checkpoint, where there is one."""
    bar.set_postfix_str(f", {TITLES.get(name, name)}, seed {seed}")
    progress = Progress(bar, done)
    if not (folder / "result.json").exists():
        baseline = RECIPES / "baselines" / f"{name}.yaml"
        remember(folder, {"baseline": yaml.safe_load(baseline.read_text())})
        # The setting, the baseline, and then what only this script knows.
        all_arguments = [*arguments[:2], "--config", str(baseline), *arguments[2:]]
        all_arguments += ["--seed_everything", str(seed), "--data.seed", str(seed)]
        all_arguments += ["--trainer.default_root_dir", str(folder)]
        if name == "seqkd":
            pairs = Path(arguments[arguments.index("--data.source.path") + 1]).with_name("seqkd.jsonl")
            all_arguments += ["--data.source.path", str(pairs), "--data.source.output", "output"]
        curve, last = Curve(), LastCheckpoint(folder / "checkpoints")
        case = Case(all_arguments, [curve, progress, last])
        checkpoint = None
        if any((folder / "checkpoints").glob("*.ckpt")):
            checkpoint = str(newest_checkpoint(folder, [folder / "checkpoints"]))
        else:
            case.trainer.validate(case.model, case.datamodule, verbose=False)
        case.trainer.fit(case.model, case.datamodule, ckpt_path=checkpoint)
        case.model.criterion = DistillationCriterion()  # one head for all, whatever the baseline's own is
        path = folder / "answers-{key}.jsonl"
        figures, _ = evaluate(case.trainer, case.model, case.datamodule, path, decoding)
        with atomic_file(folder / "result.json") as file:
            file.write_text(json.dumps({"figures": figures, "curve": curve.points}, indent=2))
        shutil.rmtree(folder / "checkpoints")
    bar.update(1 - progress.moved)


def evaluate_teacher(folder: Path, teacher: str, arguments: list[str], decoding: Decoding) -> None:
    """The teacher in the student's place."""
    with FileLock(folder / ".lock"):
        if not (folder / "result.json").exists():
            case = Case(arguments)
            module = DistillationModule(teacher, f"cache:{folder / 'cache'}")
            figures, _ = evaluate(case.trainer, module, case.datamodule, folder / "test.jsonl", decoding)
            with atomic_file(folder / "result.json") as file:
                file.write_text(json.dumps({"figures": figures}, indent=2))


# --------------------------------------------------------------------------------------------------------------------
# The report


def report(output: Path, setting: Path, names: Sequence[tuple[str, int]], seeds: Sequence[int]) -> None:
    results = {
        (name, seed): json.loads((output / name / f"seed{seed}" / "result.json").read_text()) for name, seed in names
    }
    teacher = json.loads((output / "teacher/result.json").read_text())["figures"]
    baselines = list(dict.fromkeys(name for name, _ in names))
    values = {
        name: {column: [results[name, seed]["figures"].get(column, math.nan) for seed in seeds] for column in COLUMNS}
        for name in baselines
    }
    with atomic_file(output / "comparison.csv") as file, file.open("w", newline="") as handle:
        figures = sorted({figure for result in results.values() for figure in result["figures"]})
        writer = csv.writer(handle)
        writer.writerow(["baseline", "seed", *figures])
        for (name, seed), result in results.items():
            writer.writerow([name, seed, *(result["figures"].get(figure, "") for figure in figures)])
        writer.writerow(["teacher", "", *(teacher.get(figure, "") for figure in figures)])
    with atomic_file(output / "comparison.json") as file:
        raw = [{"baseline": name, "seed": seed, **result} for (name, seed), result in results.items()]
        file.write_text("[\n" + ",\n".join(json.dumps(line) for line in raw) + "\n]\n")
    with atomic_file(output / "comparison.png") as file:
        draw({name: [results[name, seed]["curve"] for seed in seeds] for name in baselines}).savefig(
            file, dpi=150, format="png"
        )
    lines = [
        f"# Divergences compared: {setting.name}",
        "",
        f"{len(seeds)} seeds; mean ± standard deviation over seeds, on the held-out split. Nats and gaps per response "
        "token, ROUGE-L and self-BLEU in percent; answers are sampled.",
        "",
        *markdown(["", *COLUMNS.values()], [
            *([TITLES.get(name, name), *(spread(values[name][column]) for column in COLUMNS)] for name in baselines),
            ["teacher", *(f"{teacher.get(column, math.nan):.3f}" for column in COLUMNS)],
        ]),
    ]  # fmt: skip
    if REFERENCE in baselines and len(seeds) > 1:
        lines += [
            "",
            f"What it differs from {TITLES[REFERENCE]} by, seed by seed: mean and 95 % interval (Student's t). In bold "
            "where the interval leaves out 0.",
            "",
            *markdown(["", *COLUMNS.values()], [
                [TITLES.get(name, name)]
                + [difference(values[name][column], values[REFERENCE][column]) for column in COLUMNS]
                for name in baselines if name != REFERENCE
            ]),
        ]  # fmt: skip
    versions = ", ".join(f"{name} {metadata.version(name)}" for name in ("torch", "lightning", "transformers"))
    lines += [
        "",
        "![Head error, tail error and the head's share of the error removed, against epochs](comparison.png)",
        "",
        f"Python {platform.python_version()}, {versions}, {torch.get_num_threads()} threads a process.",
    ]
    with atomic_file(output / "comparison.md") as file:
        file.write_text("\n".join(lines) + "\n")
    print("\n".join(lines))
    print(f"\nReport: {output / 'comparison.md'}, with every run in comparison.csv and .json, and comparison.png")


COLOURS = {"fkl": "#0072b2", "rkl": "#d55e00", "akl": "#009e73", "fkl_rkl": "#cc79a7"}


def draw(curves: dict[str, list[list[dict[str, float]]]]) -> Figure:
    """Errors against epochs, means over seeds; the KL family in colour, the others in grey."""
    figure = Figure(figsize=(12, 4), layout="constrained", facecolor="white")
    head, tail, share = figure.subplots(1, 3)
    styles = ["--", ":", "-.", (0, (1, 3)), (0, (5, 1)), (0, (3, 1, 1, 1))]
    for name, runs in curves.items():
        epochs = [point["epoch"] for point in runs[0]]
        means = {
            part: [statistics.fmean(point[f"val/{part}"] for point in points) for points in zip(*runs, strict=True)]
            for part in ("head_error", "tail_error")
        }
        colour = COLOURS.get(name, "#888888")
        look = {"color": colour, "lw": 1.8, "label": TITLES.get(name, name)}
        if name not in COLOURS:
            look |= {"linestyle": styles.pop(0) if styles else "-", "lw": 1}
        head.plot(epochs, means["head_error"], **look)
        tail.plot(epochs, means["tail_error"], **look)
        if name in COLOURS:
            removed = [
                (means["head_error"][0] - h, means["tail_error"][0] - t)
                for h, t in zip(means["head_error"][1:], means["tail_error"][1:], strict=True)
            ]
            share.plot(epochs[1:], [h / (h + t) for h, t in removed], **look)
    for axes, title in ((head, "head error"), (tail, "tail error"), (share, "head's share of the error removed")):
        axes.set(xlabel="epoch", title=title)
        axes.grid(alpha=0.3)
    head.set_ylabel("mean |p - q| per response token, held out")
    figure.legend(*head.get_legend_handles_labels(), loc="outside right center", frameon=False)
    return figure


if __name__ == "__main__":
    run_command(lambda: auto_cli(main, as_positional=False))
