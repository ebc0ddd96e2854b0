"""Is it worth learning on one's own answers? Off-policy and on-policy at equal numbers of scored tokens, several seeds.

    python recipes/compare_on_policy.py --teacher TEACHER --output runs/compare_on_policy
    python recipes/compare_on_policy.py --teacher TEACHER --methods [off_policy_akl,on_1_rkl] --seeds [0,1,2,3,4] ...
    python recipes/compare_on_policy.py --teacher TEACHER --accelerator cuda ...

TEACHER is the folder that gpt2_distill.py speaks of. For each seed a student is warmed up off-policy, once; from there
each method goes on until the teacher has scored the same number of tokens. Methods are off-policy AKL; on-policy with a
share of 0.5 and 1 and AKL, FKL, RKL or Jensen-Shannon over the whole vocabulary; and, on rollouts alone, the estimator
that most tools use: the log-ratio of the one token that was sampled, as a reward of that token. What else differs has
controls: off-policy without cross entropy, as rollouts have none (alone), and with as many tokens as fit into the time
that a share of 1 takes (longer).

It goes on where it was killed, in the middle of a run too. Started several times, with the same output, it shares out
the runs; whoever comes last writes the report, ``comparison.md``, ``.csv`` and ``.json``.
"""

import csv
import json
import math
import platform
import shutil
import time
from collections.abc import Sequence
from dataclasses import asdict
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple

import torch
import yaml
from jsonargparse import auto_cli
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor
from tqdm import tqdm

from akl_lightning.batch import Batch
from akl_lightning.callbacks import LastCheckpoint
from akl_lightning.checkpoint import atomic_file, atomic_folder
from akl_lightning.checkpoint_io import newest_checkpoint
from akl_lightning.cli import run_command
from akl_lightning.criterion import CriterionOutput, DistillationCriterion
from akl_lightning.divergences import AdaptiveKL, Divergence, ForwardKL, JensenShannon, ReverseKL
from akl_lightning.errors import UsageError
from akl_lightning.evaluation.decoding import Decoding
from akl_lightning.metrics import TokenMean
from akl_lightning.module import DistillationModule
from akl_lightning.projection import Logits, project_and_compare
from akl_lightning.rollouts import GenerateEngine, OnPolicy, Sampling
from akl_lightning.rollouts.draw import Rollouts
from common.comparison import QUIET, Case, Progress, difference, markdown, remember, share_out, spread
from common.report import evaluate

RECIPES = Path(__file__).parent
DIVERGENCES: dict[str, tuple[str, type[Divergence]]] = {
    "akl": ("AKL", AdaptiveKL), "fkl": ("FKL", ForwardKL), "rkl": ("RKL", ReverseKL),
    "js": ("Jensen-Shannon", JensenShannon),
}  # fmt: skip
REFERENCE = "off_policy_akl"
WARM = "warm start"
COLUMNS = {
    "fkl": "FKL", "rkl": "RKL", "own_rkl": "RKL, own responses", "own_entropy": "entropy, own responses",
    "rouge_l": "ROUGE-L", "distinct_2": "distinct-2", "self_bleu": "self-BLEU", "seconds": "seconds",
    "cpu_seconds": "CPU seconds",
}  # fmt: skip


def main(
    teacher: str,
    setting: Path = RECIPES / "compare_gpt2.yaml",
    output: Path = Path("runs/compare_on_policy"),
    methods: Sequence[str] | None = None,
    seeds: Sequence[int] = (0, 1, 2),
    warm_epochs: int = 1,
    scored_tokens: int = 400_000,
    learning_rate: float = 1e-3,
    max_new_tokens: int = 48,
    decoding: Decoding = Decoding(max_new_tokens=48, seeds=(10, 20, 30)),  # noqa: B008 (it is frozen)
    accelerator: str = "cpu",
) -> None:
    """Run what is missing and report.

    Args:
        teacher: its folder.
        setting: a configuration file for the student and the data.
        output: folder of runs and report.
        methods: some of those above; None for all.
        seeds: of new weights, of the order of the samples and of rollouts.
        warm_epochs: off-policy, with AKL and cross entropy, before each method.
        scored_tokens: response tokens that the teacher scores in each method, after the warm start.
        learning_rate: of each method, constant after a warm-up of 20 steps.
        max_new_tokens: of a rollout.
        decoding: of the held-out answers.
        accelerator: of the Trainer.
    """
    methods = list(METHODS) if methods is None else methods
    for name in methods:
        if name not in METHODS:
            raise UsageError(f"there is no method {name!r}: use some of {', '.join(METHODS)}.")
    settings = {
        "setting": yaml.safe_load(setting.read_text()), "teacher": teacher, "warm_epochs": warm_epochs,
        "scored_tokens": scored_tokens, "learning_rate": learning_rate, "max_new_tokens": max_new_tokens,
        "decoding": asdict(decoding),
    }  # fmt: skip
    remember(output, settings)
    shared = ["--config", str(setting), "--model.teacher", teacher, "--data.tokenizer", teacher]
    shared += ["--trainer.accelerator", accelerator, "--trainer.val_check_interval", "1.0"]
    work = partial(run, output=output, arguments=shared, settings=settings, decoding=decoding)
    share_out(output, [(WARM, seed) for seed in seeds], work)
    names = [(name, seed) for seed in seeds for name in methods]
    share_out(output, names, work)
    report(output, setting, [WARM, *methods], seeds, settings, accelerator)


# --------------------------------------------------------------------------------------------------------------------
# The estimator, the budget, the figures


class OneTokenEstimator(DistillationModule):
    """Learns from the log-ratio of the sampled token alone, as if it were the reward of having said it.

    At each token ``y`` of a rollout the loss has the gradient of ``sg(log q(y) - log p(y)) log q(y)``, whose mean over
    ``y`` drawn from ``q`` is the gradient of ``KL(q‖p)`` at that position. What is logged is the exact divergence.
    """

    def compare(
        self, student: Logits, teacher: Logits | None, labels: Tensor, alpha: Tensor | None = None
    ) -> CriterionOutput:
        """The estimator's loss, with the statistics of the whole distributions."""
        with torch.no_grad():
            statistics = super().compare(student, teacher, labels, alpha).statistics
        return CriterionOutput(project_and_compare(student, teacher, labels, one_token)[0], statistics)


def one_token(student: Tensor, teacher: Tensor | None, labels: Tensor, gradient: Tensor | None) -> dict[str, Tensor]:
    """See :class:`OneTokenEstimator`; logits are ``[tokens, vocab]``."""
    assert teacher is not None
    log_q, at = student.log_softmax(-1), labels[:, None]
    log_p = teacher.log_softmax(-1).gather(-1, at)
    reward = log_p - log_q.gather(-1, at)
    loss = -(reward * log_q.gather(-1, at))[:, 0]
    if gradient is not None:  # of log q(y) it is 1 at y, minus q
        gradient.copy_(reward * log_q.exp())
        gradient.scatter_add_(-1, at, -reward.to(gradient.dtype))
    return {"loss": loss}


class Method(NamedTuple):
    """One way to learn, after the warm start."""

    title: str
    divergence: type[Divergence]
    share: float = 0.0
    """Of the samples that are answered anew."""

    alpha: float = 0.5
    """Weight of the divergence on the data's responses."""

    tokens: float = 1.0
    """Times ``scored_tokens``."""

    kind: type[DistillationModule] = DistillationModule


LONGER = 2.7
"""Tokens that off-policy learns from while a share of 1 samples and learns from one; measured on a CPU core."""

METHODS = {
    REFERENCE: Method("off-policy, AKL", AdaptiveKL),
    "off_policy_akl_alone": Method("off-policy, AKL without cross entropy", AdaptiveKL, alpha=1.0),
    "off_policy_akl_longer": Method(f"off-policy, AKL, {LONGER} × the tokens", AdaptiveKL, tokens=LONGER),
    "off_policy_akl_alone_longer": Method(
        f"off-policy, AKL without cross entropy, {LONGER} × the tokens", AdaptiveKL, alpha=1.0, tokens=LONGER
    ),
    **{
        f"on_{share:g}_{name}": Method(f"on-policy, share {share:g}, {called}", divergence, share)
        for share in (0.5, 1.0)
        for name, (called, divergence) in DIVERGENCES.items()
    },
    "on_1_one_token": Method("on-policy, share 1, one-token log-ratio", ReverseKL, 1.0, kind=OneTokenEstimator),
}


class Budget(Callback):
    """Ends a run when so many response tokens were scored, and counts its seconds; goes on with both."""

    def __init__(self, tokens: int) -> None:
        self.tokens = tokens
        self.scored = 0
        self.seconds = self.cpu_seconds = 0.0
        self._since: tuple[float, float] | None = None

    def on_train_batch_start(self, *_: Any) -> None:
        self._since = self._since or (time.perf_counter(), time.process_time())

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, outputs: Any, *_: Any) -> None:
        assert self._since is not None
        self.scored += outputs["statistics"]["loss"].numel()
        now = time.perf_counter(), time.process_time()
        self.seconds += now[0] - self._since[0]
        self.cpu_seconds += now[1] - self._since[1]
        self._since = now
        trainer.should_stop = self.scored >= self.tokens

    def on_validation_end(self, *_: Any) -> None:
        self._since = None

    def state_dict(self) -> dict[str, Any]:
        return {"scored": self.scored, "seconds": self.seconds, "cpu_seconds": self.cpu_seconds}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.scored, self.seconds = state_dict["scored"], state_dict["seconds"]
        self.cpu_seconds = state_dict.get("cpu_seconds", math.nan)


class Judged(DistillationModule):
    """Answers the test prompts, the same draws for each student, and asks the teacher of each token."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.own = torch.nn.ModuleDict({"own_rkl": TokenMean("rkl"), "own_entropy": TokenMean("cross_entropy")})

    def test_step(self, batch: Batch, batch_idx: int, dataloader_idx: int = 0) -> dict[str, Any]:
        """Compare on the data, then on own responses; minus the log of what was drawn estimates the entropy."""
        assert isinstance(self.rollouts, Rollouts)
        output = super().test_step(batch, batch_idx, dataloader_idx)
        new = self.rollouts.answered_by_student(batch, len(batch["labels"]))
        statistics = self.distill(new).statistics
        for metric in self.own.values():
            metric.update(**statistics)
        return output

    def on_test_epoch_end(self) -> None:
        """Log both."""
        super().on_test_epoch_end()
        for name, metric in self.own.items():
            self.log(f"test/{name}", metric.compute().float())
            metric.reset()


# --------------------------------------------------------------------------------------------------------------------
# Runs


def run(
    folder: Path,
    name: str,
    seed: int,
    bar: tqdm,
    output: Path,
    arguments: list[str],
    settings: dict[str, Any],
    decoding: Decoding,
) -> None:
    """Train, test and write ``result.json``, unless it is there; go on from a checkpoint, where there is one."""
    bar.set_postfix_str(f", {name}, seed {seed}")
    moved = 0.0
    if not (folder / "result.json").exists():
        arguments = [*arguments, "--seed_everything", str(seed), "--data.seed", str(seed)]
        arguments += ["--trainer.default_root_dir", str(folder)]
        budget = Budget(round(settings["scored_tokens"] * (1.0 if name == WARM else METHODS[name].tokens)))
        last = LastCheckpoint(folder / "checkpoints", every_n_steps=25)
        callbacks: list[Callback]
        if name == WARM:
            arguments += ["--trainer.max_epochs", str(settings["warm_epochs"])]
            callbacks = [last]
        else:
            progress = Progress(bar, lambda _: budget.scored / budget.tokens)
            callbacks = [budget, progress, last]
            arguments += ["--model.student", str(output / WARM / f"seed{seed}" / "student")]
            arguments += ["--trainer.max_epochs", "100000", "--trainer.limit_val_batches", "0"]
            arguments += ["--model.optimizer.lr", str(settings["learning_rate"])]
            arguments += ["--model.lr_scheduler", "constant_with_warmup", "--model.warmup_steps", "20"]
        case = Case(arguments, callbacks)
        module = case.model if name == WARM else module_of(METHODS[name], seed, case, settings)
        checkpoint = None
        if any((folder / "checkpoints").glob("*.ckpt")):
            checkpoint = str(newest_checkpoint(folder, [folder / "checkpoints"]))
        case.trainer.fit(module, case.datamodule, ckpt_path=checkpoint)
        figures = judged(folder, seed, case, module, settings, decoding)
        if name == WARM:
            with atomic_folder(folder / "student") as unfinished:
                module.student.model.save_pretrained(unfinished)
                case.datamodule.tokenizer.save_pretrained(unfinished)
        else:
            figures |= {"seconds": budget.seconds, "cpu_seconds": budget.cpu_seconds, "scored_tokens": budget.scored}
            moved = progress.moved
        with atomic_file(folder / "result.json") as file:
            file.write_text(json.dumps(figures, indent=2))
        shutil.rmtree(folder / "checkpoints", ignore_errors=True)
    bar.update(1 - moved)


def module_of(method: Method, seed: int, case: Case, settings: dict[str, Any]) -> DistillationModule:
    """The module of a method, around the student, the teacher and the optimizer of a case."""
    own = case.model
    decoding = Sampling(settings["max_new_tokens"])
    on_policy = OnPolicy(method.share, decoding, engine=GenerateEngine(), validation_samples=0, seed=seed)
    return method.kind(
        own.student.model,
        settings["teacher"],
        criterion=DistillationCriterion(method.divergence(), alpha=method.alpha),
        optimizer=own.optimizer,
        lr_scheduler=own.lr_scheduler,
        warmup_steps=own.warmup_steps,
        on_policy=on_policy,
    )


def judged(
    folder: Path, seed: int, case: Case, module: DistillationModule, settings: dict[str, Any], decoding: Decoding
) -> dict[str, float]:
    """Figures of a student on the held-out split."""
    own = OnPolicy(1.0, Sampling(settings["max_new_tokens"]), engine=GenerateEngine())
    # One head for all, whatever the method's own is.
    student = Judged(module.student.model, settings["teacher"], on_policy=own)
    flags = {**QUIET, "enable_progress_bar": False, "accelerator": case.config.trainer.accelerator}
    trainer = Trainer(**flags, default_root_dir=folder)
    figures, _ = evaluate(trainer, student, case.datamodule, folder / "answers-{key}.jsonl", decoding)
    return figures


# --------------------------------------------------------------------------------------------------------------------
# The report


def title(name: str) -> str:
    return name if name == WARM else METHODS[name].title


def report(
    output: Path, setting: Path, names: Sequence[str], seeds: Sequence[int], settings: dict[str, Any], accelerator: str
) -> None:
    results = {
        (name, seed): json.loads((output / name / f"seed{seed}" / "result.json").read_text())
        for name in names
        for seed in seeds
    }
    values = {
        name: {column: [results[name, seed].get(column, math.nan) for seed in seeds] for column in COLUMNS}
        for name in names
    }
    with atomic_file(output / "comparison.csv") as file, file.open("w", newline="") as handle:
        figures = sorted({figure for result in results.values() for figure in result})
        writer = csv.writer(handle)
        writer.writerow(["method", "seed", *figures])
        for (name, seed), result in results.items():
            writer.writerow([name, seed, *(result.get(figure, "") for figure in figures)])
    with atomic_file(output / "comparison.json") as file:
        raw = [{"method": name, "seed": seed, **result} for (name, seed), result in results.items()]
        file.write_text("[\n" + ",\n".join(json.dumps(line) for line in raw) + "\n]\n")
    lines = [
        f"# On-policy and off-policy compared: {setting.name}",
        "",
        f"{len(seeds)} seeds; mean ± standard deviation over seeds, on the held-out split. Each method goes on from "
        f"the warm start of its seed ({settings['warm_epochs']} epochs off-policy) until the teacher has scored "
        f"{settings['scored_tokens']:,} more tokens, if its name does not say otherwise. Nats per token; own responses "
        "are sampled at temperature 1, the same draws for each student; ROUGE-L and self-BLEU in percent. Seconds are "
        "those of training alone.",
        "",
        *markdown(["", *COLUMNS.values()], [
            [title(name), *(spread(values[name][column]) for column in COLUMNS)] for name in names
        ]),
    ]  # fmt: skip
    if REFERENCE in names and len(seeds) > 1:
        lines += [
            "",
            f"What it differs from {title(REFERENCE)} by, seed by seed: mean and 95 % interval (Student's t). In bold "
            "where the interval leaves out 0.",
            "",
            *markdown(["", *COLUMNS.values()], [
                [title(name)]
                + [difference(values[name][column], values[REFERENCE][column]) for column in COLUMNS]
                for name in names if name != REFERENCE
            ]),
        ]  # fmt: skip
    versions = ", ".join(f"{name} {metadata.version(name)}" for name in ("torch", "lightning", "transformers"))
    device = torch.cuda.get_device_name() if accelerator in ("cuda", "gpu") else f"{torch.get_num_threads()} threads"
    lines += ["", f"Python {platform.python_version()}, {versions}, {device} a process."]
    with atomic_file(output / "comparison.md") as file:
        file.write_text("\n".join(lines) + "\n")
    print("\n".join(lines))
    print(f"\nReport: {output / 'comparison.md'}, with every run in comparison.csv and .json")


if __name__ == "__main__":
    run_command(lambda: auto_cli(main, as_positional=False))
