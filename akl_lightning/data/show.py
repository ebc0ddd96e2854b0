"""``akl show``: look at samples without any model."""

from typing import Literal

from akl_lightning.data.module import InstructionDataModule
from akl_lightning.data.preview import show
from akl_lightning.errors import UsageError
from akl_lightning.parser import OneSentenceParser


def show_samples(args: list[str]) -> None:
    """Show samples as a model sees them, what is learnt of them marked: ``akl show``."""
    parser = OneSentenceParser(
        prog="akl show",
        usage="akl show [PATH] --data.tokenizer NAME [options]",
        description="Show samples as a model sees them, what is learnt of them marked. PATH is a file, folder or "
        "pattern, short for --data.source Files --data.source.path PATH.",
    )
    parser.add_argument("--split", type=Literal["train", "validation", "test"], default="train", help="Which ones.")
    parser.add_argument("--samples", type=int, default=3, help="How many, spread over the split.")
    parser.add_argument("--tokens", action="store_true", help="Print ids and labels as well.")
    parser.add_class_arguments(InstructionDataModule, "data")
    if args and not args[0].startswith("-"):
        args = ["--data.source", "Files", "--data.source.path", args[0], *args[1:]]
    config = parser.parse_args(args)
    if config.samples < 1:
        raise UsageError(f"samples must be 1 or more, got {config.samples}.")
    data: InstructionDataModule = parser.instantiate(config).data
    data.setup("show")
    if not len(data.splits[config.split]):
        raise UsageError(
            f"{type(data.source).__name__} gives no {config.split} samples to show: give another split, or a source "
            "with one."
        )
    show(data, config.split, config.samples, config.tokens)
