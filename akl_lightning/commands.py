"""The commands that need no Lightning, which takes two seconds to import."""

import sys
from collections.abc import Callable
from typing import Literal

from jsonargparse import set_parsing_settings

from akl_lightning.entry import COMMANDS as DESCRIPTIONS
from akl_lightning.errors import UsageError
from akl_lightning.parser import OneSentenceParser
from akl_lightning.run_command import run_command


def judge_answers(args: list[str]) -> None:
    """Let a judge model compare two models' answers: ``akl judge``."""
    try:
        from akl_lightning.evaluation.chat import ChatEndpoint
        from akl_lightning.evaluation.judge import judge
    except ImportError as error:
        raise UsageError(f'akl judge needs {error.name}: pip install -e ".[judge]".') from error

    parser = OneSentenceParser(prog="akl judge", description=DESCRIPTIONS["judge"])
    parser.add_function_arguments(judge, skip={"endpoint"}, as_positional=True)
    names = parser.add_class_arguments(ChatEndpoint)
    config = parser.parse_args(args)
    judge(config.answers_a, config.answers_b, ChatEndpoint(**{name: config[name] for name in names}), config.output)


def tokenizers(args: list[str]) -> None:
    """Look at what two tokenizers have in common: ``akl tokenizers``."""
    from akl_lightning.tokenizers.figures import compare_tokenizers

    parser = OneSentenceParser(prog="akl tokenizers", description=DESCRIPTIONS["tokenizers"])
    parser.add_function_arguments(compare_tokenizers, as_positional=True)
    compare_tokenizers(**parser.parse_args(args).as_dict())


def show_samples(args: list[str]) -> None:
    """Show samples as a model sees them, what is learnt of them marked: ``akl show``."""
    from akl_lightning.data.preview import show
    from akl_lightning.data.samples import InstructionData

    parser = OneSentenceParser(
        prog="akl show",
        usage="akl show [PATH] --data.tokenizer NAME [options]",
        description=f"{DESCRIPTIONS['show']} PATH is a file, folder or pattern, short for --data.source Files "
        "--data.source.path PATH.",
    )
    parser.add_argument("--split", type=Literal["train", "validation", "test"], default="train", help="Which ones.")
    parser.add_argument("--samples", type=int, default=3, help="How many, spread over the split.")
    parser.add_argument("--tokens", action="store_true", help="Print ids and labels as well.")
    parser.add_class_arguments(InstructionData, "data")
    if args and not args[0].startswith("-"):
        args = ["--data.source", "Files", "--data.source.path", args[0], *args[1:]]
    config = parser.parse_args(args)
    if config.samples < 1:
        raise UsageError(f"samples must be 1 or more, got {config.samples}.")
    data: InstructionData = parser.instantiate(config).data
    data.encode()
    if not len(data.splits[config.split]):
        raise UsageError(
            f"{type(data.source).__name__} gives no {config.split} samples to show: give another split, or a source "
            "with one."
        )
    show(data, config.split, config.samples, config.tokens)


COMMANDS: dict[str, Callable[[list[str]], None]] = {
    "judge": judge_answers,
    "show": show_samples,
    "tokenizers": tokenizers,
}
"""What each does with its arguments."""


def main() -> None:
    """Run the command that comes first."""
    set_parsing_settings(add_print_completion_argument=True)
    run_command(lambda: COMMANDS[sys.argv[1]](sys.argv[2:]))
