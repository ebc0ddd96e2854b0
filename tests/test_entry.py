"""``akl`` before anything heavy is imported."""

import gc
import subprocess
import sys

import pytest

from akl_lightning import cli, commands, entry
from akl_lightning.compat import options_of, subcommands_of


def akl(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    """Its exit code; whatever would need more than names is an error."""
    monkeypatch.setattr(sys, "argv", ["akl", *arguments])
    monkeypatch.setitem(sys.modules, "akl_lightning.cli", None)
    try:
        entry.main()
    except SystemExit as end:
        return int(end.code or 0)
    return 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            [],
            "no command is given: give one of fit, validate, test, predict, cache, generate, judge, show, tokenizers.",
        ),
        (["fitt", "--help"], "there is no command fitt: did you mean fit?"),
        (["distil"], "there is no command distil: give one of fit, validate,"),
    ],
)
def test_a_command_that_is_none_is_one_sentence(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    assert akl(monkeypatch, *arguments) == 2
    assert message in capsys.readouterr().err.split("error: ")[1]


def test_the_help_names_what_the_parser_behind_it_has(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    asked: list[cli.OneSentenceParser] = []

    class Caught(cli.CommandCLI):
        def parse_arguments(self, parser: cli.OneSentenceParser, args: object) -> None:
            asked.append(parser)
            raise SystemExit

    monkeypatch.setattr(sys, "argv", ["akl"])
    cli.set_parsing_settings(add_print_completion_argument=True)
    with pytest.raises(SystemExit):
        Caught()
    assert list(subcommands_of(asked[0]).choices) == list(entry.COMMANDS)
    # jsonargparse adds --print_completion when it parses.
    assert set(options_of(entry.command_list())) - {"--print_completion"} <= set(options_of(asked[0]))
    assert akl(monkeypatch, "--help") == 0
    output = capsys.readouterr().out
    assert all(f"{name} " in output and what in output for name, what in entry.COMMANDS.items())


def test_the_commands_that_need_no_lightning_are_those_that_say_so(monkeypatch: pytest.MonkeyPatch) -> None:
    """``akl`` refuses here whatever asks for the rest of the command line."""
    run: list[list[str]] = []
    monkeypatch.setattr(gc, "freeze", lambda: None)
    for name in ("show", "generate"):
        monkeypatch.setitem(commands.COMMANDS, name, run.append)
        assert akl(monkeypatch, name, "--tokens") == 0
    assert run == [["--tokens"]] * 2 and set(commands.COMMANDS) < set(entry.COMMANDS)
    monkeypatch.delitem(commands.COMMANDS, "show")
    with pytest.raises(ImportError, match=r"akl_lightning\.cli"):
        akl(monkeypatch, "show")


def test_what_a_command_line_does_not_need_is_not_imported() -> None:
    script = """
import sys
from akl_lightning import entry
sys.argv = ["akl", "--help"]
entry.main()
print("early:", *sorted({name.partition(".")[0] for name in sys.modules} & {"torch", "jsonargparse", "yaml"}))
import akl_lightning.commands, akl_lightning.data.preview, akl_lightning.data.samples, akl_lightning.tokenizers.figures
light = {"lightning", "matplotlib", "torchmetrics", "transformers.modeling_utils"}
print("light:", *sorted(light & sys.modules.keys()))
import akl_lightning.cli
late = {"datasets", "nltk", "openai", "peft", "tenacity", "tensorboard", "transformers.modeling_utils"}
print("late:", *sorted(late & sys.modules.keys()))
"""
    ended = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120, check=True)
    assert ended.stdout.splitlines()[-3:] == ["early:", "light:", "late:"]
