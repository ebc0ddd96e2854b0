"""The ``akl`` command: the Lightning CLI for distillation, and what is no training; errors in one sentence."""

from akl_lightning.interrupts import EXIT_CODE  # before all that takes seconds to import

# isort: split
import logging
import os
import re
import shlex
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any

import shtab
from jsonargparse import Namespace, capture_parser, set_parsing_settings
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelSummary, ProgressBar
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.seed import isolate_rng

# All of them, so that --trainer.callbacks knows them by their names.
from akl_lightning.callbacks import (
    DistillationProgressBar,
    DistillationSummary,
    HeadTailPlot,
    LastCheckpoint,
    StudentExport,
)
from akl_lightning.checkpoint import AtomicCheckpointIO, newest_checkpoint
from akl_lightning.compat import actions_of, keeps_given_settings, subcommands_of
from akl_lightning.data.module import InstructionDataModule
from akl_lightning.data.show import show_samples
from akl_lightning.errors import UsageError
from akl_lightning.evaluation.generate import AnswerWriter
from akl_lightning.models.load import load_tokenizer
from akl_lightning.models.vocabulary import name_for_tokens
from akl_lightning.module import DistillationModule
from akl_lightning.optimization import try_optimizer
from akl_lightning.parser import OneSentenceParser, one_sentence
from akl_lightning.teachers.cache.writer import CacheWriter, write_cache
from akl_lightning.teachers.choose import has_own_model

LOST_PROCESSES = {
    "DataLoader worker": "a process that prepares batches died, often for want of memory: lower data.num_workers, and "
    "go on from the last checkpoint.",
    "Connection closed by peer": "another process of this run died: look at its messages, and go on from the last "
    "checkpoint.",
    "Connection reset by peer": "another process of this run died: look at its messages, and go on from the last "
    "checkpoint.",
}
"""What a RuntimeError of torch says when a process is gone, and what is said to the user instead."""

_TWICE = "trainer.callbacks has {} twice: give it once."

MODELS = ("teacher", "student", "model")
"""The arguments of modules that name a model."""


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
            parser_class=OneSentenceParser,
            **kwargs,
        )

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Let ``--data.tokenizer`` be left out, and a shell complete a model as a folder."""
        parser.set_defaults({"data.tokenizer": ""})
        for action in actions_of(parser):
            if action.dest in {f"model.{role}" for role in MODELS}:
                # By its type it might be any module that torch has, with all of their arguments.
                action.complete = shtab.DIRECTORY  # type: ignore[attr-defined]

    def before_instantiate_classes(self) -> None:
        """Take the tokenizer of the first model that has a name, and new models' vocabulary from it."""
        config = self.config if self.subcommand is None else self.config[self.subcommand]
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
    """Say what jsonargparse says of an error in one sentence; a bug in a class is shown as it is."""
    try:
        yield
    except ValueError as error:
        # What the class has raised, behind what jsonargparse says of it.
        cause: BaseException = error
        while cause.__cause__ is not None:
            cause = cause.__cause__
        if not isinstance(cause, UsageError | MisconfigurationException | ImportError | OSError):
            raise
        raise UsageError(one_sentence(str(error))) from error


@keeps_given_settings
class DistillationCLI(InstructionCLI):
    """The Lightning CLI with the distillation module as ``--model``.

    Args:
        kwargs: of :class:`lightning.pytorch.cli.LightningCLI`.
    """

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(DistillationModule, **kwargs)

    def before_instantiate_classes(self) -> None:
        """Look at what costs little, and find what ``--ckpt_path last`` means: Lightning would start afresh without."""
        config = self.config if self.subcommand is None else self.config[self.subcommand]
        if config.get("ckpt_path") == "last":
            root = Path(config.trainer.default_root_dir or ".")
            config.ckpt_path = str(newest_checkpoint(root, root.rglob("checkpoints")))
        self.look_first()
        super().before_instantiate_classes()

    def look_first(self) -> None:
        """Look at checkpoint, folders, optimizer and schedule, once, before anything that takes long.

        Raises:
            UsageError: one of them cannot be had.
        """
        config = self.config if self.subcommand is None else self.config[self.subcommand]
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
            # Without any, Lightning takes 1,000 epochs.
            ends = config.trainer.max_epochs != -1 or config.trainer.max_steps != -1
            try_optimizer(settings.model.optimizer, settings.model.lr_scheduler, ends)

    def instantiate_classes(self) -> None:
        """Read and tokenize the data before the models, which take longer."""
        with isolate_rng():  # new models are the same whether there was something to tokenize
            data = InstructionDataModule(**self._without_models().data.as_dict())
            data.setup(self.subcommand or "fit")
        super().instantiate_classes()
        self.datamodule.splits = data.splits

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


def run_command(main: Callable[[], object]) -> None:
    """Run a command; a mistake that the user can mend ends it with one sentence and exit code 2, Ctrl-C with 130.

    Args:
        main: the command.
    """
    # Lightning's advice to install more of its makers' packages; that it adds no summary of its own.
    noise = re.compile("Tip:|Trainer already configured with model summary")
    logger = logging.getLogger("lightning.pytorch.utilities.rank_zero")
    logger.addFilter(lambda record: noise.search(str(record.msg)) is None)
    # Its handler keeps the stream that it began with, past the one that a progress bar puts in its place.
    for handler in logging.getLogger("lightning.pytorch").handlers:
        if type(handler) is logging.StreamHandler:  # not what captures it for somebody
            handler.emit = partial(_say, handler)  # type: ignore[method-assign]
    # What libraries still call is nothing that a user could change: lightning 2.6's pytree, torchdata 0.11's set_vital.
    warnings.filterwarnings("ignore", message=".*(LeafSpec|set_vital).* is deprecated")
    # A TTY that went away (a closed pager, head) is no mistake.
    with suppress(BrokenPipeError):
        try:
            main()
        except BrokenPipeError:
            raise
        except KeyboardInterrupt as error:
            sys.stderr.write("interrupted\n")
            raise SystemExit(EXIT_CODE) from error
        except SystemExit as end:
            if not isinstance(end.__context__, KeyboardInterrupt):
                raise
            raise SystemExit(EXIT_CODE) from end  # the Trainer's own way to end has 1
        except (UsageError, OSError, MisconfigurationException) as error:
            sys.stderr.write(f"error: {error}\n")
            raise SystemExit(2) from error
        except RuntimeError as error:
            lost = [sentence for sign, sentence in LOST_PROCESSES.items() if sign in str(error)]
            if not lost:
                raise
            sys.stderr.write(f"error: {lost[0]}\n")
            raise SystemExit(2) from error


def _say(handler: logging.Handler, record: logging.LogRecord) -> None:
    sys.stderr.write(f"{handler.format(record)}\n")


class WriterCLI(InstructionCLI):
    """The Lightning CLI with a module as ``--model`` that writes something by prediction; it has no subcommands.

    Args:
        module: its class.
        command: its name.
        description: what it does.
        args: the command line, without the command.
    """

    def __init__(self, module: type[LightningModule], command: str, description: str, args: list[str]) -> None:
        super().__init__(
            module,
            save_config_callback=None,
            trainer_defaults={"logger": False},
            parser_kwargs={"prog": f"akl {command}", "description": description},
            args=args,
            run=False,
        )

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        """Parse these arguments, which are those of the process but for the command's name."""
        self.config = parser.parse_args(args)


def cache(args: list[str]) -> None:
    """Write the cache of a teacher: ``akl cache``."""
    cli = WriterCLI(CacheWriter, "cache", "Write the cache of a teacher, to train without it.", args)
    write_cache(cli.model, cli.datamodule, cli.trainer)


def generate(args: list[str]) -> None:
    """Write a model's answers to the prompts of a split: ``akl generate``."""
    cli = WriterCLI(AnswerWriter, "generate", "Write a model's answers to the prompts of a split.", args)
    cli.trainer.predict(cli.model, cli.datamodule, return_predictions=False)
    print(f"Answers: {cli.model.path}")


def judge_answers(args: list[str]) -> None:
    """Let a judge model compare two models' answers: ``akl judge``."""
    from akl_lightning.evaluation.chat import ChatEndpoint
    from akl_lightning.evaluation.judge import judge

    parser = OneSentenceParser(prog="akl judge", description="Let a judge model compare the answers of two models.")
    parser.add_function_arguments(judge, skip={"endpoint"}, as_positional=True)
    names = parser.add_class_arguments(ChatEndpoint)
    config = parser.parse_args(args)
    judge(config.answers_a, config.answers_b, ChatEndpoint(**{name: config[name] for name in names}), config.output)


def tokenizers(args: list[str]) -> None:
    """Look at what two tokenizers have in common: ``akl tokenizers``."""
    from akl_lightning.tokenizers.figures import compare_tokenizers

    parser = OneSentenceParser(prog="akl tokenizers", description="Look at what two tokenizers have in common.")
    parser.add_function_arguments(compare_tokenizers, as_positional=True)
    compare_tokenizers(**parser.parse_args(args).as_dict())


COMMANDS: dict[str, Callable[[list[str]], None]] = {
    "cache": cache,
    "generate": generate,
    "judge": judge_answers,
    "show": show_samples,
    "tokenizers": tokenizers,
}
"""What ``akl`` has besides the subcommands of the Lightning CLI."""


class CommandCLI(DistillationCLI):
    """The Lightning CLI whose help, and whose shell completion, know of :data:`COMMANDS` too."""

    def setup_parser(self, *args: Any, **kwargs: Any) -> None:
        """Add the commands' own parsers."""
        super().setup_parser(*args, **kwargs)
        subcommands = subcommands_of(self.parser)
        for name, command in COMMANDS.items():
            parser = capture_parser(command, [])
            subcommands.add_subcommand(name, parser, help=parser.description)

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
        run_command(lambda: CommandCLI(parser_kwargs={"prog": "akl", "description": "Distil language models."}))


if __name__ == "__main__":
    main()
