"""The ``akl`` command: the Lightning CLI for distillation, and what is no training; errors in one sentence."""

from akl_lightning.interrupts import EXIT_CODE as EXIT_CODE  # before all that takes seconds to import

# isort: split
import os
import re
import shlex
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import shtab
from jsonargparse import Namespace, capture_parser, set_parsing_settings
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelSummary, ProgressBar
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.seed import isolate_rng

from akl_lightning import commands

# All of them, so that --trainer.callbacks knows them by their names.
from akl_lightning.callbacks import (
    DistillationProgressBar,
    DistillationSummary,
    HeadTailPlot,
    LastCheckpoint,
    StudentExport,
)
from akl_lightning.checkpoint_io import AtomicCheckpointIO, newest_checkpoint
from akl_lightning.compat import actions_of, keeps_given_settings, subcommands_of
from akl_lightning.data.module import InstructionDataModule
from akl_lightning.entry import COMMANDS as DESCRIPTIONS
from akl_lightning.entry import DESCRIPTION
from akl_lightning.errors import UsageError
from akl_lightning.evaluation.generate import AnswerWriter
from akl_lightning.learning_rate import chosen_rate, leave_out_default
from akl_lightning.models.load import load_tokenizer, look_for_causal_lm
from akl_lightning.models.vocabulary import name_for_tokens
from akl_lightning.module import DistillationModule
from akl_lightning.optimization import end_after_epochs, try_optimizer
from akl_lightning.parser import OneSentenceParser
from akl_lightning.rollouts.settings import CACHED_TEACHER
from akl_lightning.run_command import run_command as run_command
from akl_lightning.run_config import RunConfig
from akl_lightning.teachers.cache.writer import CacheWriter, write_cache
from akl_lightning.teachers.choose import has_own_model, is_cache, look_for_teacher

_TWICE = "trainer.callbacks has {} twice: give it once."

MODELS = ("teacher", "student", "model")
"""The arguments of modules that name a model."""


class DistillationParser(OneSentenceParser, LightningArgumentParser):
    """A parser of Lightning's that says what is wrong in one sentence."""

    def dump(self, cfg: Any, *more: Any, **settings: Any) -> str:
        """Leave out a learning rate that nobody has given: it is chosen when the student is there."""
        cfg = cfg.clone()
        leave_out_default(cfg.get("model.optimizer"))
        return super().dump(cfg, *more, **settings)


class InstructionCLI(LightningCLI):
    """The Lightning CLI with the instruction data as ``--data``.

    The tokenizer is a model's unless it is given, and a new model's vocabulary is the tokenizer's.

    Args:
        module: what ``--model`` is.
        kwargs: of :class:`lightning.pytorch.cli.LightningCLI`.
    """

    def __init__(self, module: type[LightningModule], **kwargs: Any) -> None:
        super().__init__(
            module,
            InstructionDataModule,
            # A module's own optimizer and lr_scheduler are arguments of it.
            auto_configure_optimizers=False,
            seed_everything_default=0,
            parser_class=DistillationParser,
            **kwargs,
        )

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Let ``--data.tokenizer`` be left out, and a shell complete a model as a folder."""
        parser.set_defaults({"data.tokenizer": ""})
        for action in actions_of(parser):
            if action.dest in {f"model.{role}" for role in MODELS}:
                # By its type it might be any module that torch has, with all of their arguments.
                action.complete = shtab.DIRECTORY  # type: ignore[attr-defined]

    @property
    def settings(self) -> Namespace:
        """What was parsed for the subcommand that runs, or for a CLI without any."""
        return self.config if self.subcommand is None else self.config[self.subcommand]

    def before_instantiate_classes(self) -> None:
        """Take the tokenizer of the first model that has a name, and new models' vocabulary from it."""
        config = self.settings
        models = {role: config.model[role] for role in MODELS if role in config.model}
        if not has_own_model(models.get("teacher")):
            models.pop("teacher", None)
        if not config.data.tokenizer:
            config.data.tokenizer = name_for_tokens(models, config.data.trust_remote_code)
            if config.data.tokenizer is None:
                raise UsageError("no model here has a name to take the tokenizer of: give data.tokenizer.")
        for role, model in models.items():
            if isinstance(model, Mapping) and "model_type" in model and isinstance(config.data.tokenizer, str):
                tokenizer = load_tokenizer(config.data.tokenizer, config.data.trust_remote_code)
                ids = {name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
                config.model[role] = {"vocab_size": len(tokenizer), **ids, **model}

    def instantiate_classes(self) -> None:
        """Say in one sentence what a class does not accept or lacks, such as the package of a logger."""
        with in_one_sentence():
            super().instantiate_classes()

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        """Say in one sentence what the Trainer does not accept."""
        try:
            return super().instantiate_trainer(**kwargs)
        except ValueError as error:
            raise UsageError(str(error)) from error
        except RuntimeError as error:
            twice = re.match("Found more than one stateful callback of type `(.*?)`", str(error))
            if twice is None:
                raise
            raise UsageError(_TWICE.format(twice[1])) from error


@contextmanager
def in_one_sentence() -> Iterator[None]:
    """Say in one sentence what a class has raised, without what jsonargparse says of it; a bug is shown as it is."""
    try:
        yield
    except ValueError as error:
        cause: BaseException | None = error
        while cause is not None and not isinstance(
            cause, UsageError | MisconfigurationException | ImportError | OSError
        ):
            cause = cause.__cause__
        if cause is None:
            raise
        names = re.findall(r"class_path='([\w.]+)'", str(error))[:1]
        raise UsageError(": ".join([*names, " ".join(str(cause).split())])) from error


@keeps_given_settings
class DistillationCLI(InstructionCLI):
    """The Lightning CLI with the distillation module as ``--model``.

    Args:
        kwargs: of :class:`lightning.pytorch.cli.LightningCLI`.
    """

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(DistillationModule, **{"save_config_callback": RunConfig, **kwargs})

    def before_instantiate_classes(self) -> None:
        """Look at what costs little, and find what ``--ckpt_path last`` means: Lightning would start afresh without."""
        config = self.settings
        if config.get("ckpt_path") == "last":
            root = Path(config.trainer.default_root_dir or ".")
            config.ckpt_path = str(newest_checkpoint(root, root.rglob("checkpoints")))
        leave_out_default(config.model.optimizer)
        if self.subcommand in (None, "fit"):
            end_after_epochs(config.trainer)
        self.look_first()
        super().before_instantiate_classes()

    def look_first(self) -> None:
        """Look at settings, checkpoint, folders, optimizer, schedule and models, before anything that takes long.

        Raises:
            UsageError: one of them cannot be had.
        """
        config = self.settings
        if self._samples and self.subcommand in (None, "fit", "validate") and is_cache(config.model.teacher):
            raise UsageError(CACHED_TEACHER)
        checkpoint = config.get("ckpt_path")
        if checkpoint and checkpoint not in ("best", "hpc") and ":" not in checkpoint:
            AtomicCheckpointIO().load_checkpoint(checkpoint)
        if self.subcommand in (None, "fit"):
            root = Path(config.trainer.default_root_dir or ".")
            settings = self._without_models()
            callbacks = settings.trainer.callbacks or []
            keys = [callback.state_key for callback in callbacks]
            if twice := {key for key in keys if keys.count(key) > 1}:
                raise UsageError(_TWICE.format(min(twice).split("{")[0]))
            for callback in callbacks:
                if isinstance(callback, HeadTailPlot | LastCheckpoint | StudentExport):
                    callback.look(root, goes_on=checkpoint is not None)
            given = config.trainer
            endless = given.max_epochs == -1 or (given.max_epochs is None and given.max_time is not None)
            ends = not endless or given.max_steps != -1 or bool(given.fast_dev_run)
            try_optimizer(settings.model.optimizer, settings.model.lr_scheduler, ends)
        look_for_causal_lm(config.model.student, config.model.trust_remote_code, "student")
        look_for_teacher(config.model.teacher, config.model.trust_remote_code)

    @property
    def _samples(self) -> bool:
        """Whether the student is to learn on-policy."""
        on_policy = self.settings.model.get("on_policy")
        return on_policy is not None and on_policy.share > 0

    def instantiate_classes(self) -> None:
        """Read and tokenize the data before the models, which take longer."""
        with isolate_rng():  # new models are the same whether there was something to tokenize
            data = InstructionDataModule(**self._without_models().data.as_dict())
            data.prompts_alone = self._samples
            data.setup(self.subcommand or "fit")
        super().instantiate_classes()
        self.datamodule.go_on_from(data)
        config = self.settings
        if (chosen := chosen_rate(self.model)) is not None and not config.get("ckpt_path"):
            config.model.optimizer.init_args.lr = chosen.rate  # for the config.yaml of the run

    def _without_models(self) -> Namespace:
        """The settings, what they name made into objects, but for models, loggers and what is not the package's own."""
        settings = self.config.clone()
        config = settings if self.subcommand is None else settings[self.subcommand]
        config.model = Namespace({name: config.model[name] for name in ("optimizer", "lr_scheduler")})
        given = config.trainer.callbacks
        callbacks = [callback for callback in (given if isinstance(given, list) else [given]) if callback]
        own = [callback for callback in callbacks if callback.class_path.startswith("akl_lightning.")]
        config.trainer = Namespace(callbacks=own or None)
        with in_one_sentence(), isolate_rng():
            settings = self.parser.instantiate(settings, instantiate_groups=False)
        return settings if self.subcommand is None else settings[self.subcommand]

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        """Add the pack's progress bar and summary, where the user has not chosen others or none."""
        config = self.config_init if self.subcommand is None else self.config_init[self.subcommand]
        more = _progress_and_summary(config.trainer)
        self.trainer_defaults["callbacks"] = [*self.trainer_defaults.get("callbacks", []), *more]
        trainer = super().instantiate_trainer(**kwargs)
        for callback in trainer.callbacks:  # type: ignore[attr-defined]
            if isinstance(callback, LastCheckpoint):
                callback.command = own_command()
        return trainer


def own_command() -> str:
    """This process's command line but for ``--ckpt_path``, to be typed again."""
    program, *arguments = sys.argv
    kept = [
        word
        for before, word in zip(["", *arguments], arguments, strict=False)
        if "--ckpt_path" not in (before, word.split("=")[0])
    ]
    # torchrun does not tell its workers how it was called.
    launched = ["torchrun", "..."] if "TORCHELASTIC_RUN_ID" in os.environ else ["python"] * program.endswith(".py")
    return f"{' '.join(launched)} {shlex.join([program if launched else Path(program).name, *kept])}".strip()


def _progress_and_summary(settings: Namespace) -> list[Callback]:
    given = settings.callbacks if isinstance(settings.callbacks, list) else [settings.callbacks]
    callbacks: list[Callback] = []
    for callback, kind, wanted in (
        (DistillationProgressBar(), ProgressBar, settings.enable_progress_bar),
        (DistillationSummary(), ModelSummary, settings.enable_model_summary),
    ):
        if wanted is not False and not settings.barebones and not any(isinstance(each, kind) for each in given):
            callbacks.append(callback)
    return callbacks


class WriterCLI(InstructionCLI):
    """The Lightning CLI with a module as ``--model`` that writes something by prediction; it has no subcommands.

    Args:
        module: its class.
        command: its name.
        args: the command line, without the command.
    """

    def __init__(self, module: type[LightningModule], command: str, args: list[str]) -> None:
        super().__init__(
            module,
            save_config_callback=None,
            trainer_defaults={"logger": False},
            parser_kwargs={"prog": f"akl {command}", "description": DESCRIPTIONS[command]},
            args=args,
            run=False,
        )

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        """Parse these arguments, which are those of the process but for the command's name."""
        self.config = parser.parse_args(args)


def cache(args: list[str]) -> None:
    """Write the cache of a teacher: ``akl cache``."""
    cli = WriterCLI(CacheWriter, "cache", args)
    write_cache(cli.model, cli.datamodule, cli.trainer)


def generate(args: list[str]) -> None:
    """Write a model's answers to the prompts of a split: ``akl generate``."""
    cli = WriterCLI(AnswerWriter, "generate", args)
    cli.trainer.predict(cli.model, cli.datamodule, return_predictions=False)
    print(f"Answers: {cli.model.path}")


COMMANDS: dict[str, Callable[[list[str]], None]] = {
    "cache": cache,
    "generate": generate,
    **commands.COMMANDS,
}
"""What ``akl`` has besides the subcommands of the Lightning CLI."""


class CommandCLI(DistillationCLI):
    """The Lightning CLI with a parser for the subcommand that comes first; else for all, and :data:`COMMANDS` too."""

    @staticmethod
    def subcommands() -> dict[str, set[str]]:
        """The subcommand that the command line begins with, or all: each parser takes a tenth of a second."""
        known = DistillationCLI.subcommands()
        return {name: known[name] for name in sys.argv[1:2] if name in known} or known

    def setup_parser(self, *args: Any, **kwargs: Any) -> None:
        """Add the commands' own parsers, which a shell completes too."""
        super().setup_parser(*args, **kwargs)
        if len(self.subcommands()) == 1:
            return
        subcommands = subcommands_of(self.parser)
        for name, command in COMMANDS.items():
            with suppress(UsageError):  # one that needs a package which is not there
                subcommands.add_subcommand(name, capture_parser(command, []), help=DESCRIPTIONS[name])

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        """Refuse a command behind an option: it is no method of the Trainer."""
        super().parse_arguments(parser, args)
        if self.config.subcommand in COMMANDS:
            raise UsageError(f"the command comes first: akl {self.config.subcommand}, then its options.")


def main() -> None:
    """``akl fit|validate|test|predict`` are the Lightning CLI's; the others are :data:`COMMANDS`."""
    set_parsing_settings(add_print_completion_argument=True)
    command = COMMANDS.get(sys.argv[1]) if len(sys.argv) > 1 else None
    if command is not None:
        run_command(lambda: command(sys.argv[2:]))
    else:
        run_command(lambda: CommandCLI(parser_kwargs={"prog": "akl", "description": DESCRIPTION}))


if __name__ == "__main__":
    main()
