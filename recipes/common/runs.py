"""A recipe's runs: each with everything in a folder of its own, from its command line to its report."""

import json
import math
import os
import re
import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import TensorBoardLogger
from rich.console import Console

from akl_lightning.callbacks import (
    AdaptiveWeightMonitor,
    DistributionPlot,
    HeadTailPlot,
    HeadWeightMap,
    LastCheckpoint,
    SampledAnswers,
    StudentExport,
)
from akl_lightning.checkpoint import claim_folder, free_path
from akl_lightning.checkpoint_io import newest_checkpoint
from akl_lightning.cli import DistillationCLI
from akl_lightning.data.collate import column
from akl_lightning.errors import UsageError
from akl_lightning.evaluation.answers import Record
from akl_lightning.evaluation.decoding import Decoding
from akl_lightning.module import DistillationModule
from akl_lightning.teachers.aligned import AlignedTeacher
from akl_lightning.teachers.choose import is_cache
from akl_lightning.teachers.live import LiveTeacher
from common.report import comparison_table, evaluate, evaluate_rollouts


class RunCLI(DistillationCLI):
    """The command line of a recipe: the Lightning CLI, with a folder for each run and the pack's callbacks.

    A recipe subclasses it to find models and data in ``before_instantiate_classes``.

    Args:
        defaults: YAML file of the recipe's settings, which any argument overrides.
        description: what ``--help`` begins with.
        args: the command line; None for that of the process.
    """

    run_folder: Path

    def __init__(self, defaults: Path, description: str | None, args: list[str] | None = None) -> None:
        self.defaults = defaults
        super().__init__(
            run=False,
            args=args,
            parser_kwargs={"description": description},
            save_config_kwargs={"save_to_log_dir": False},
        )

    def add_arguments_to_parser(self, parser: Any) -> None:
        """Add ``--ckpt_path`` and ``--output_dir``."""
        parser.add_argument(
            "--ckpt_path", type=str | None, help="Checkpoint to go on from, or 'last' for the last run's."
        )
        parser.add_argument(
            "--output_dir",
            type=str,
            default=f"runs/{self.defaults.stem}",
            help="Folder of the run; where there is one already, -v1 is added.",
        )
        super().add_arguments_to_parser(parser)

    def parse_arguments(self, parser: Any, args: Any) -> None:
        """Read the defaults first, then the settings of the run that goes on."""
        # As a first --config: jsonargparse 4.53 cannot read an optimizer from its default_config_files.
        defaults, args = ["--config", str(self.defaults)], sys.argv[1:] if args is None else args
        config = parser.parse_args([*defaults, *args])
        if config.ckpt_path is not None:
            self.run_folder, checkpoint = find_run(Path(config.output_dir), config.ckpt_path)
            # What is on the command line beats the settings of the run that goes on.
            written = sorted(self.run_folder.glob("config*.yaml"), key=lambda path: path.stat().st_mtime_ns)
            before = ["--config", str(written[-1])] if written else []
            config = parser.parse_args([*defaults, *before, *args])
            config.ckpt_path = checkpoint
        self.config = config

    def look_first(self) -> None:
        """Refuse a cache, too."""
        if is_cache(self.config.model.teacher):
            raise UsageError("this recipe lets the teacher answer prompts, which a cache cannot: train with akl fit.")
        super().look_first()

    def before_instantiate_classes(self) -> None:
        """Choose the run's folder, and what watches the run."""
        config = self.config
        super().before_instantiate_classes()
        if config.ckpt_path is None:
            self.run_folder = claim_run(Path(config.output_dir))
        run = self.run_folder
        config.trainer.default_root_dir = str(run)
        callbacks: list[Callback] = [HeadTailPlot(str(run)), StudentExport(str(run / "student"))]
        if not config.trainer.fast_dev_run:
            if config.trainer.logger is not False:
                callbacks += [
                    AdaptiveWeightMonitor(every_n_steps=10),
                    HeadWeightMap(),
                    DistributionPlot(),
                    SampledAnswers(),
                ]
            callbacks += [
                # Beside the logs, not below them: the folder must be found again whatever version the logger counts.
                ModelCheckpoint(run / "checkpoints", monitor="val/divergence", save_on_train_epoch_end=False),
                LastCheckpoint(run / "checkpoints", every_n_steps=50),
            ]
        # The last one writes last.ckpt, and is to know what the others have kept.
        self.own_callbacks = callbacks

    def instantiate_classes(self) -> None:
        """Leave no empty folder where something cannot be had."""
        try:
            super().instantiate_classes()
        except BaseException:
            with suppress(OSError):  # it is not empty
                self.run_folder.rmdir()
            raise

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        """Log to TensorBoard, in the folder; a callback that is given stands in for the recipe's own of its kind."""
        given = self.config_init.trainer.callbacks or []
        given = given if isinstance(given, list) else [given]
        for callback in given:
            if isinstance(callback, LastCheckpoint) and callback.dirpath is None:
                callback.dirpath = str(self.run_folder / "checkpoints")  # where it is looked for
        kinds = {callback.state_key for callback in given}
        self.trainer_defaults["callbacks"] = [own for own in self.own_callbacks if own.state_key not in kinds]
        if self.config.trainer.logger in (None, True):
            kwargs["logger"] = TensorBoardLogger(self.run_folder, name="tensorboard", version="")
        return super().instantiate_trainer(**kwargs)


def claim_run(output_dir: Path) -> Path:
    """Make the folder of a new run, which no other run has; the same one on every rank.

    Args:
        output_dir: where it is to lie; ``-v1`` and so on are added where there is one already.
    """
    # A rank that the Trainer has launched has it from the one that launched it.
    launched = os.environ.get("AKL_RUN_FOLDER") if "LOCAL_RANK" in os.environ else None
    run = launched or said_by_rank_0(lambda: str(claim_folder(output_dir)))
    os.environ["AKL_RUN_FOLDER"] = run
    return Path(run)


_stores: list[Any] = []
"""Kept, because what rank 0 has in its own is gone with it."""


def said_by_rank_0(what: Callable[[], str]) -> str:
    """What rank 0 says, on all ranks that a launcher (torchrun) has started, before they are a process group.

    Args:
        what: called on rank 0 alone.
    """
    environment = {"RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"}
    if not environment <= os.environ.keys() or os.environ["WORLD_SIZE"] == "1":
        return what()
    store, rank, _ = next(torch.distributed.rendezvous("env://"))
    store = torch.distributed.PrefixStore("akl_lightning", store)
    _stores.append(store)
    if rank == 0:
        said = ""
        try:
            said = what()
        finally:
            store.set("said", said)
        return said
    said = store.get("said").decode()
    if not said:
        sys.exit(0)  # rank 0 says why
    return said


def find_run(output_dir: Path, ckpt_path: str) -> tuple[Path, str]:
    """The folder of a run that goes on.

    Args:
        output_dir: where runs lie.
        ckpt_path: a checkpoint, or ``last``.

    Returns:
        The folder, and the checkpoint to go on from.

    Raises:
        UsageError: there is no such checkpoint.
    """
    if ckpt_path == "last":
        name = re.compile(re.escape(output_dir.name) + r"(-v\d+)?")
        siblings = output_dir.parent.iterdir() if output_dir.parent.is_dir() else ()
        runs = [path for path in siblings if path.is_dir() and name.fullmatch(path.name)]
        ckpt_path = str(newest_checkpoint(output_dir, (path / "checkpoints" for path in runs)))
    if not Path(ckpt_path).is_file():
        raise UsageError(f"there is no checkpoint {ckpt_path}: give the path of one, or 'last'.")
    return Path(ckpt_path).resolve().parent.parent, ckpt_path


def distill(cli: RunCLI) -> None:
    """Evaluate the student, distil it, evaluate it and the teacher, and report.

    Args:
        cli: has module, data and Trainer.
    """
    trainer, module, data, run = cli.trainer, cli.model, cli.datamodule, cli.run_folder
    say = Console().print if trainer.is_global_zero else lambda *_: None
    samples = data.batch_size * trainer.world_size * trainer.accumulate_grad_batches
    say(
        f"Global batch: {samples} samples = {data.batch_size} per device × {trainer.world_size} devices "
        f"× {trainer.accumulate_grad_batches} accumulated"
    )
    decoding = Decoding(module.max_new_tokens)
    rows: dict[str, dict[str, float]] = {}
    answers: dict[str, list[list[Record]]] = {}

    watched = module.rollouts.on and cli.config.model.on_policy.validation_samples > 0

    def look_at(name: str, module: DistillationModule) -> None:
        path = run / "answers" / f"{name.replace(' ', '-')}-{{key}}.jsonl"
        rows[name], answers[name] = evaluate(trainer, module, data, path, decoding)
        if not column(data.splits["test"], "learnt").any():  # prompts alone
            rows[name] = {figure: value for figure, value in rows[name].items() if not math.isnan(value)}
            if watched and name != "teacher":
                rows[name] |= evaluate_rollouts(trainer, module, data)

    say("[bold]The student before distillation")
    look_at("student before", module)
    say("[bold]Distillation")
    trainer.fit(module, data, ckpt_path=cli.config.ckpt_path)
    if (share := trainer.callback_metrics.get("train/sampling_share")) is not None:
        speed = trainer.callback_metrics["train/sampling_tokens_per_second"]
        say(f"Sampling: {share:.0%} of the time of the training batches, {speed:,.0f} tokens a second and device")
    say("[bold]The student after distillation, and the teacher")
    look_at("student after", module)
    # In the student's place, compared with itself; it lies in memory but once.
    if isinstance(module.teacher, AlignedTeacher):
        data = data.of_teacher()
        module.model_tokenizers = dict.fromkeys(module.model_tokenizers, data.tokenizer)
        module.teacher = module.teacher.teacher
    if isinstance(module.teacher, LiveTeacher):
        module.student = module.teacher.model
    else:
        source = module.student.model.get_base_model().name_or_path
        module = DistillationModule(source, source, trust_remote_code=cli.config.model.trust_remote_code)
    look_at("teacher", module)
    if trainer.is_global_zero:
        report(run, rows, answers, trainer)


def report(
    run: Path, rows: dict[str, dict[str, float]], answers: dict[str, list[list[Record]]], trainer: Trainer
) -> None:
    """Write ``report.json``, and print the figures, some answers, and where everything lies.

    Args:
        run: the run's folder.
        rows: figures of each model.
        answers: of ``student after`` and ``teacher``, to the same prompts.
        trainer: has the callbacks of :class:`RunCLI`.
    """
    path = free_path(run / "report.json")
    path.write_text(json.dumps({"figures": rows}, indent=2))
    console = Console()
    console.print()
    if any("cross_entropy" in figures for figures in rows.values()):
        console.print(comparison_table(rows, "Held-out split: nats and gaps per response token, ROUGE-L in percent"))
    else:
        console.print("The held-out split holds prompts alone, with no response to measure anything on.")
        if any("rollout_rkl" in figures for figures in rows.values()):
            console.print("The student's own answers to the validation split's prompts: nats per token")
            console.print(comparison_table(rows, ""))
    console.print("Some held-out prompts")
    pairs = list(zip(answers["student after"], answers["teacher"], strict=True))
    for (student, *_), (teacher, *_) in pairs[:: max(1, len(pairs) // 4)][:4]:
        print(f"\n{student['prompt'].strip()}")
        said = {"teacher": teacher["answer"], "student": student["answer"]}
        if references := [reference for reference in student["references"] if reference]:
            said = {"reference": " | ".join(references), **said}
        for who, text in said.items():
            print(f"  {who:>9}: {' '.join(text.split())}")
    callbacks = trainer.callbacks  # type: ignore[attr-defined]
    export = next(callback for callback in callbacks if isinstance(callback, StudentExport))
    plot = next(callback for callback in callbacks if isinstance(callback, HeadTailPlot))
    print(f"\nHead and tail error per epoch: {plot.path}")
    print(f"Figures:                       {path}")
    print(f"All answers:                   {run / 'answers'}")
    print(f"Checkpoints:                   {run / 'checkpoints'}")
    print(f"Student, for from_pretrained:  {export.exported}")
    if export.exported_best:
        print(f"The best by validation:        {export.exported_best}")
    print(f"TensorBoard:                   tensorboard --logdir {run / 'tensorboard'}")
