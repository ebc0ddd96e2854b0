"""A recipe's runs: each with everything in a folder of its own, from its command line to its report."""

import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeVar

from lightning.pytorch import Callback, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import TensorBoardLogger
from rich.console import Console

from akl_lightning.callbacks import (
    AdaptiveWeightMonitor,
    DistillationProgressBar,
    DistillationSummary,
    DistributionPlot,
    HeadTailPlot,
    HeadWeightMap,
    LastCheckpoint,
    SampledAnswers,
    StudentExport,
)
from akl_lightning.checkpoint import free_path, newest_checkpoint
from akl_lightning.cli import DistillationCLI
from akl_lightning.errors import UsageError
from akl_lightning.evaluation.answers import Record
from akl_lightning.evaluation.report import comparison_table
from akl_lightning.teachers.cache import CACHE_PREFIX

Found = TypeVar("Found", bound=Callback)


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
            seed_everything_default=0,
            parser_kwargs={"description": description},
            # A run's folder is new, or it is the one being resumed.
            save_config_kwargs={"overwrite": True},
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
        parser.set_defaults({"data.tokenizer": ""})

    def parse_arguments(self, parser: Any, args: Any) -> None:
        """Read the defaults first."""
        # As a first --config: jsonargparse 4.53 cannot read an optimizer from its default_config_files.
        self.config = parser.parse_args(["--config", str(self.defaults), *(sys.argv[1:] if args is None else args)])

    def before_instantiate_classes(self) -> None:
        """Choose the folder, and what watches the run."""
        config = self.config
        if str(config.model.teacher).startswith(CACHE_PREFIX):
            raise UsageError("this recipe lets the teacher answer prompts, which a cache cannot: train with akl fit.")
        run, config.ckpt_path = choose_run(Path(config.output_dir), config.ckpt_path)
        self.run_folder = run
        config.trainer.default_root_dir = str(run)
        callbacks: list[Callback] = [HeadTailPlot(str(run)), StudentExport(str(run / "student"))]
        own = [callback.class_path for callback in config.trainer.callbacks or []]
        if config.trainer.enable_progress_bar is not False and not any(path.endswith("ProgressBar") for path in own):
            callbacks.append(DistillationProgressBar())
        if config.trainer.enable_model_summary is not False:
            callbacks.append(DistillationSummary())
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
        self.trainer_defaults["callbacks"] = callbacks

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        """Log to TensorBoard, in the folder."""
        if self.config.trainer.logger in (None, True):
            kwargs["logger"] = TensorBoardLogger(self.run_folder, name="tensorboard", version="")
        return super().instantiate_trainer(**kwargs)


def choose_run(output_dir: Path, ckpt_path: str | None) -> tuple[Path, str | None]:
    """A new folder for a new run; the old one for a run that goes on.

    Args:
        output_dir: where runs lie; ``-v1`` and so on are added to the later ones.
        ckpt_path: None for a new run, a checkpoint, or ``last``.

    Returns:
        The folder, and the checkpoint to go on from.

    Raises:
        UsageError: there is no such checkpoint.
    """
    if ckpt_path is None:
        # A launched rank has to agree with the one that launched it, which has begun to fill the folder.
        run = Path(os.environ.get("AKL_RUN_FOLDER") or free_path(output_dir))
        os.environ["AKL_RUN_FOLDER"] = str(run)
        return run, None
    if ckpt_path == "last":
        runs = [path for path in (output_dir, *output_dir.parent.glob(f"{output_dir.name}-v*")) if path.is_dir()]
        ckpt_path = str(newest_checkpoint(path / "checkpoints" for path in runs))
    if not Path(ckpt_path).is_file():
        raise UsageError(f"there is no checkpoint {ckpt_path}: give the path of one, or 'last'.")
    return Path(ckpt_path).resolve().parent.parent, ckpt_path


def report(
    run: Path, rows: dict[str, dict[str, float]], answers: dict[str, list[list[Record]]], trainer: Trainer
) -> None:
    """Write ``report.json``, and print the figures, some answers, and where everything lies.

    Args:
        run: the run's folder.
        rows: figures of each model.
        answers: of ``student`` and ``teacher``, to the same prompts.
        trainer: has the callbacks of :class:`RunCLI`.
    """
    path = free_path(run / "report.json")
    path.write_text(json.dumps({"figures": rows}, indent=2))
    console = Console()
    console.print()
    console.print(comparison_table(rows, "Held-out split: nats and gaps per response token, ROUGE-L in percent"))
    console.print("Some held-out prompts")
    step = max(1, len(answers["student"]) // 4)
    for (student, *_), (teacher, *_) in list(zip(answers["student"], answers["teacher"], strict=True))[::step][:4]:
        print(f"\n{student['prompt'].strip()}")
        said = {
            "reference": " | ".join(student["references"]),
            "teacher": teacher["answer"],
            "student": student["answer"],
        }
        for who, text in said.items():
            print(f"  {who:>9}: {' '.join(text.split())}")
    export, plot = _first(trainer.callbacks, StudentExport), _first(trainer.callbacks, HeadTailPlot)  # type: ignore[attr-defined]
    print(f"\nHead and tail error per epoch: {plot.path}")
    print(f"Figures:                       {path}")
    print(f"All answers:                   {run / 'answers'}")
    print(f"Checkpoints:                   {run / 'checkpoints'}")
    print(f"Student, for from_pretrained:  {export.exported}")
    if export.exported_best:
        print(f"The best by validation:        {export.exported_best}")
    print(f"TensorBoard:                   tensorboard --logdir {run / 'tensorboard'}")


def _first(callbacks: Sequence[Callback], kind: type[Found]) -> Found:
    return next(callback for callback in callbacks if isinstance(callback, kind))
