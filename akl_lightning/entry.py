"""Where ``akl`` begins: what needs no torch is said at once, the rest is the command line's behind it."""

from akl_lightning.interrupts import EXIT_CODE as EXIT_CODE  # before all that takes seconds to import

# isort: split
import atexit
import gc
import os
import sys
from argparse import ArgumentParser
from contextlib import suppress
from difflib import get_close_matches
from importlib import import_module

DESCRIPTION = "Distil language models."

COMMANDS = {
    "fit": "Train a student to answer as its teacher does.",
    "validate": "Measure a student on the validation split.",
    "test": "Measure a student on the test split.",
    "predict": "Let a student answer, in a run of Lightning's.",
    "cache": "Write the cache of a teacher, to train without it.",
    "generate": "Write a model's answers to the prompts of a split.",
    "judge": "Let a judge model compare the answers of two models.",
    "show": "Show samples with what is learnt of them marked.",
    "tokenizers": "Look at what two tokenizers have in common.",
}
"""What each command does."""


def command_list() -> ArgumentParser:
    """A parser that knows the commands by name alone, for ``akl --help``."""
    parser = ArgumentParser(prog="akl", description=DESCRIPTION, epilog="akl COMMAND --help lists a command's options.")
    parser.add_argument("-c", "--config", help="YAML or JSON file of settings, each under its command's name")
    parser.add_argument("--print_completion", metavar="SHELL", help="print what makes a shell complete akl's options")
    commands = parser.add_subparsers(title="commands", required=True)
    for name, description in COMMANDS.items():
        commands.add_parser(name, help=description)
    return parser


def main() -> None:
    """Run ``akl``."""
    first = sys.argv[1] if len(sys.argv) > 1 else ""
    if first in ("-h", "--help"):
        command_list().print_help()
        return
    if first not in COMMANDS and not first.startswith("-"):
        close = get_close_matches(first, COMMANDS, 1)
        said = f"there is no command {first}" if first else "no command is given"
        hint = f"did you mean {close[0]}?" if close else f"give one of {', '.join(COMMANDS)}."
        sys.stderr.write(f"error: {said}: {hint}\n(--help lists the commands)\n")
        raise SystemExit(2)
    # What imports make stays: to look for garbage in it takes a third of their time.
    gc.disable()
    from akl_lightning.commands import COMMANDS as WITHOUT_LIGHTNING
    from akl_lightning.commands import main as run

    if first not in WITHOUT_LIGHTNING:
        from akl_lightning.compat import import_torchmetrics

        import_torchmetrics()
        # From here, these cost half a second less than from within other imports: jsonargparse's lazy_instance, which
        # their defaults are, looks at the whole stack.
        for module in ("criterion", "data.module", "module"):
            import_module(f"akl_lightning.{module}")
        from akl_lightning.cli import main as run
    from akl_lightning.parser import ParserExit

    gc.freeze()
    gc.enable()
    atexit.register(gc.unfreeze)  # Triton takes what is left then for a leak
    try:
        run()
    except ParserExit as end:  # nothing has begun yet, and to take 5,000 modules apart takes a second
        with suppress(BrokenPipeError):
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(end.code)


if __name__ == "__main__":
    main()
