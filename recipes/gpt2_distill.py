"""Distil a GPT-2 teacher into a smaller GPT-2 student with AKL, end to end.

    python recipes/gpt2_distill.py                                    # the embedded default, gpt2_distill.yaml
    python recipes/gpt2_distill.py --trainer.max_epochs 1 --model.criterion.divergence ReverseKL
    python recipes/gpt2_distill.py --config recipes/gpt2_dolly.yaml   # the paper's setting, from the public hub
    python recipes/gpt2_distill.py --ckpt_path last                   # go on with the run before

By default nothing is downloaded: the corpus is the documentation of Python's standard library, the tokenizer and the
teacher are trained on it and cached, and the student is distilled, tested and exported. --trainer.* is the student's
training, --teacher.* the teacher's; --help lists every option.
"""

import hashlib
import json
import os
import platform
import sys
from dataclasses import asdict
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock
from lightning.pytorch import Trainer, seed_everything
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.cli import instantiate_class
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.utilities.seed import isolate_rng
from rich.console import Console
from tokenizers import ByteLevelBPETokenizer
from transformers import PreTrainedTokenizerFast

import akl_lightning
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
from akl_lightning.checkpoint import atomic_folder, free_path, newest_checkpoint
from akl_lightning.cli import DistillationCLI, run_command
from akl_lightning.criterion import DistillationCriterion
from akl_lightning.data.module import InstructionDataModule, split_pairs
from akl_lightning.data.sources import Pair
from akl_lightning.errors import UsageError
from akl_lightning.evaluation.answers import Record
from akl_lightning.evaluation.decoding import Decoding
from akl_lightning.evaluation.report import comparison_table, evaluate
from akl_lightning.models import SplitModel, load_causal_lm
from akl_lightning.module import DistillationModule
from akl_lightning.teachers.cache import CACHE_PREFIX

console = Console()
END_OF_TEXT = "<|endoftext|>"


def main(args: list[str] | None = None) -> None:
    cli = Recipe(
        run=False,
        args=args,
        seed_everything_default=0,
        parser_kwargs={"description": __doc__},
        # A run's folder is new, or it is the one being resumed.
        save_config_kwargs={"overwrite": True},
    )
    trainer, module, data = cli.trainer, cli.model, cli.datamodule
    say = console.print if trainer.is_global_zero else lambda *_: None
    samples = data.batch_size * trainer.world_size * trainer.accumulate_grad_batches
    say(
        f"Global batch: {samples} samples = {data.batch_size} per device × {trainer.world_size} devices "
        f"× {trainer.accumulate_grad_batches} accumulated"
    )

    folder, decoding = cli.run_folder / "answers", Decoding(module.max_new_tokens)
    say("[bold]The student before distillation")
    rows, answers = {}, {}
    rows["student before"], _ = evaluate(trainer, module, data, folder / "student-before-{model}.jsonl", decoding)

    say("[bold]Distillation")
    trainer.fit(module, data, ckpt_path=cli.config.ckpt_path)

    say("[bold]The student after distillation, and the teacher")
    rows["student after"], answers["student"] = evaluate(
        trainer, module, data, folder / "student-after-{model}.jsonl", decoding
    )
    # The teacher in the student's place, compared with itself.
    source = cli.config.model.teacher
    teacher = DistillationModule(source, source, trust_remote_code=cli.config.model.trust_remote_code)
    rows["teacher"], answers["teacher"] = evaluate(trainer, teacher, data, folder / "teacher-{model}.jsonl", decoding)

    if trainer.is_global_zero:
        report(cli.run_folder, rows, answers, trainer)


def report(
    run: Path, rows: dict[str, dict[str, float]], answers: dict[str, list[list[Record]]], trainer: Trainer
) -> None:
    """Print the comparison and where everything lies."""
    report_path = free_path(run / "report.json")
    report_path.write_text(json.dumps({"figures": rows}, indent=2))
    console.print()
    console.print(comparison_table(rows, "Held-out split: nats and gaps per response token, ROUGE-L in percent"))
    console.print("Some held-out prompts")
    step = max(1, len(answers["student"]) // 4)
    for (student, *_), (teacher, *_) in list(zip(answers["student"], answers["teacher"], strict=True))[::step][:4]:
        print(f"\n{student['prompt'].strip()}")
        print(f"  reference: {' | '.join(student['references'])}")
        print(f"    teacher: {teacher['answer']}")
        print(f"    student: {student['answer']}")
    export = next(callback for callback in trainer.callbacks if isinstance(callback, StudentExport))
    plot = next(callback for callback in trainer.callbacks if isinstance(callback, HeadTailPlot)).path
    print(f"\nHead and tail error per epoch: {plot}")
    print(f"Figures:                       {report_path}")
    print(f"All answers:                   {run / 'answers'}")
    print(f"Checkpoints:                   {run / 'checkpoints'}")
    print(f"Student, for from_pretrained:  {export.exported}")
    if export.exported_best:
        print(f"The best by validation:        {export.exported_best}")
    print(f"TensorBoard:                   tensorboard --logdir {run / 'tensorboard'}")


class Recipe(DistillationCLI):
    """The command line: Lightning's own, with the teacher's section and the run's folder."""

    run_folder: Path

    def add_arguments_to_parser(self, parser: Any) -> None:
        parser.add_argument(
            "--ckpt_path", type=str | None, help="Checkpoint to go on from, or 'last' for the last run's."
        )
        parser.add_argument(
            "--output_dir",
            type=str,
            default="runs/gpt2_distill",
            help="Folder of the run; where there is one already, -v1 is added.",
        )
        parser.add_function_arguments(prepare_teacher, "teacher", skip={"student", "data"})
        parser.set_defaults({"data.tokenizer": ""})

    def parse_arguments(self, parser: Any, args: Any) -> None:
        # As a first --config: jsonargparse 4.53 cannot read an optimizer from its default_config_files.
        embedded_default = ["--config", str(Path(__file__).with_suffix(".yaml"))]
        self.config = parser.parse_args(embedded_default + (sys.argv[1:] if args is None else args))

    def before_instantiate_classes(self) -> None:
        config = self.config
        if str(config.model.teacher).startswith(CACHE_PREFIX):
            raise UsageError("this recipe lets the teacher answer prompts, which a cache cannot: train with akl fit.")
        run, config.ckpt_path = choose_run(Path(config.output_dir), config.ckpt_path)
        # Built once before the teacher's training, so that a mistake in its settings costs no time.
        criterion = config.model.criterion
        DistillationCriterion(**criterion.as_dict() | {"divergence": instantiate_class((), criterion.divergence)})
        if config.model.teacher is None:
            config.model.teacher = str(prepare_teacher(config.model.student, config.data, **config.teacher.as_dict()))
        config.data.tokenizer = config.data.tokenizer or config.model.teacher

        self.run_folder = run
        config.trainer.default_root_dir = str(run)
        self.trainer_defaults["callbacks"] = [
            HeadTailPlot(str(run)),
            StudentExport(str(run / "student")),
        ]
        own = [callback.class_path for callback in config.trainer.callbacks or []]
        if config.trainer.enable_progress_bar is not False and not any(path.endswith("ProgressBar") for path in own):
            self.trainer_defaults["callbacks"].append(DistillationProgressBar())
        if config.trainer.enable_model_summary is not False:
            self.trainer_defaults["callbacks"].append(DistillationSummary())
        if not config.trainer.fast_dev_run:
            if config.trainer.logger is not False:
                self.trainer_defaults["callbacks"] += [
                    AdaptiveWeightMonitor(every_n_steps=10),
                    HeadWeightMap(),
                    DistributionPlot(),
                    SampledAnswers(),
                ]
            self.trainer_defaults["callbacks"] += [
                # Beside the logs, not below them: the folder must be found again whatever version the logger counts.
                ModelCheckpoint(run / "checkpoints", monitor="val/divergence", save_on_train_epoch_end=False),
                LastCheckpoint(run / "checkpoints", every_n_steps=50),
            ]

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        if self.config.trainer.logger in (None, True):
            kwargs["logger"] = TensorBoardLogger(self.run_folder, name="tensorboard", version="")
        return super().instantiate_trainer(**kwargs)


def choose_run(output_dir: Path, ckpt_path: str | None) -> tuple[Path, str | None]:
    """A new folder for a new run; the old one for a run that goes on."""
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


# --------------------------------------------------------------------------------------------------------------------
# The teacher


def prepare_teacher(
    student: Any,
    data: Any,
    model: dict[str, Any],
    vocab_size: int = 2048,
    max_epochs: int = 3,
    batch_size: int = 10,
    learning_rate: float = 1.7e-3,
    seed: int = 0,
    cache_dir: str = "~/.cache/akl_lightning",
) -> Path:
    """Train tokenizer and teacher on the training split, or find them in the cache.

    Args:
        student: what will learn from it; its positions and vocabulary are checked before any training.
        data: the settings of the data module, which the student shares.
        model: the teacher's ``transformers`` config.
        vocab_size: of the byte-level BPE tokenizer.
        max_epochs: epochs of its training.
        batch_size: of its training, on one device.
        learning_rate: of AdamW, with a cosine schedule.
        seed: of its weights and its training.
        cache_dir: where tokenizer and teacher are kept.

    Returns:
        A folder with model and tokenizer.
    """
    console.print("[bold]Corpus: reading the pairs")
    source = instantiate_class((), {"init_args": {}, **data.source.as_dict()})
    pairs = split_pairs(source.load(), data.validation_size, data.test_size)
    console.print("  " + ", ".join(f"{split}: {len(members):,}" for split, members in pairs.items()) + " pairs")
    code = [Path(__file__), *sorted(Path(akl_lightning.__file__).parent.rglob("*.py"))]
    depends_on = {
        "pairs": digest(json.dumps([asdict(pair) for pair in pairs["train"] + pairs["validation"]])),
        "code": digest(*(path.read_text() for path in code)),
        "versions": {name: metadata.version(name) for name in ("torch", "transformers", "tokenizers", "lightning")},
        "machine": f"{platform.machine()}, {'cuda' if torch.cuda.is_available() else 'cpu'}",
        "data": {
            name: data[name] for name in ("template", "max_length", "max_prompt_length", "group_by_length", "seed")
        },
        "teacher": [model, vocab_size, max_epochs, batch_size, learning_rate, seed],
    }
    key = digest(json.dumps(depends_on, sort_keys=True))[:16]
    folder = Path(cache_dir).expanduser() / f"teacher-{key}"
    folder.parent.mkdir(parents=True, exist_ok=True)
    # One process builds; others that start with it (torchrun) wait and find what it has built.
    with FileLock(folder.with_suffix(".lock")):
        if folder.exists():
            console.print(f"Tokenizer and teacher: found in {folder}", soft_wrap=True)
            return folder
        # Isolated, so that the student's weights are the same whether the teacher was trained or found.
        with atomic_folder(folder) as unfinished, isolate_rng():
            console.print("[bold]Tokenizer: training a byte-level BPE")
            tokenizer = train_tokenizer(pairs["train"], vocab_size)
            SplitModel(load_causal_lm(student)).check_fits("student", tokenizer, data.max_length)
            console.print("[bold]Teacher: training, once; later runs find it in the cache")
            seed_everything(seed, verbose=False)
            end = tokenizer.eos_token_id
            module = DistillationModule(
                model | {"vocab_size": len(tokenizer), "bos_token_id": end, "eos_token_id": end},
                criterion=DistillationCriterion(alpha=0.0),
                optimizer=lambda parameters: torch.optim.AdamW(parameters, learning_rate, weight_decay=0.1, fused=True),
                lr_scheduler="cosine",
                warmup_steps=200,
            )
            settings = data.as_dict() | {"source": source, "tokenizer": tokenizer, "batch_size": batch_size}
            trainer = Trainer(
                max_epochs=max_epochs,
                callbacks=[DistillationProgressBar()],
                devices=1,
                gradient_clip_val=1.0,
                logger=False,
                enable_checkpointing=False,
                enable_model_summary=False,
                default_root_dir=unfinished,
            )
            trainer.fit(module, InstructionDataModule(**settings))
            module.student.model.save_pretrained(unfinished)
            tokenizer.save_pretrained(unfinished)
            (unfinished / "depends_on.json").write_text(json.dumps(depends_on, indent=2))
    return folder


def train_tokenizer(pairs: list[Pair], vocab_size: int) -> PreTrainedTokenizerFast:
    bpe = ByteLevelBPETokenizer()
    texts = (f"{pair.instruction}\n{pair.input}\n{pair.output}" for pair in pairs)
    bpe.train_from_iterator(texts, vocab_size, special_tokens=[END_OF_TEXT], length=len(pairs))
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe._tokenizer, bos_token=END_OF_TEXT, eos_token=END_OF_TEXT, pad_token=END_OF_TEXT
    )


def digest(*texts: str) -> str:
    return hashlib.sha256("\0".join(texts).encode()).hexdigest()


if __name__ == "__main__":
    run_command(main)
