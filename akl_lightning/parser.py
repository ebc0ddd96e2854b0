"""A command-line parser whose errors and help are made to be read."""

import re
import sys
from difflib import get_close_matches
from itertools import pairwise
from pathlib import Path
from typing import Any, NoReturn

import yaml
from lightning.pytorch.cli import LightningArgumentParser

from akl_lightning.divergences import known_divergences


class OneSentenceParser(LightningArgumentParser):
    """A parser that says what is wrong, not how all of its hundreds of options are spelled."""

    def format_help(self, *args: Any) -> str:
        """Leave out lists of classes that nobody reads: where a module may stand, all that torch has."""
        return re.sub(r",\s+known\s+subclasses:[^()]{2000,}(?=\))", "", super().format_help(*args))

    def parse_args(self, args: Any = None, *more: Any, **settings: Any) -> Any:
        """Name a configuration file that cannot be read, which jsonargparse does not."""
        words = sys.argv[1:] if args is None else list(args)
        for option, value in pairwise(words):
            if option in ("--config", "-c") and Path(value).is_file():
                try:
                    yaml.safe_load(Path(value).read_text(encoding="utf-8"))
                except (UnicodeDecodeError, yaml.YAMLError) as error:
                    self.error(f"{value} is no YAML: {error}")
        return super().parse_args(args, *more, **settings)

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Print the mistake and the way out, and exit with code 2."""
        if not self.exit_on_error:  # jsonargparse tries one type after another and catches what does not fit
            super().error(message, ex)
        # A key may stand behind a flag that is spelled wrongly.
        message = re.sub(r"(?i)(--[\w-]*key[\w-]*[ =]+)\S+", r"\1[key]", one_sentence(message))
        options = self._option_string_actions
        if unknown := re.match(r"unrecognized arguments: (--[\w.]+)", message):
            message += "".join(f"; did you mean {name}?" for name in get_close_matches(unknown[1], options, 1))
        sys.stderr.write(f"error: {message}\n(--help lists the options)\n")
        raise SystemExit(2) from ex


def one_sentence(message: str) -> str:
    """What jsonargparse says of a value, without the types that it has tried and their reasons.

    >>> one_sentence('''Parser key "trainer.max_epochs":
    ...   Does not validate against any of the Union subtypes
    ...   Subtypes: [<class 'int'>, <class 'NoneType'>]
    ...   Errors:
    ...     - Expected a <class 'int'>
    ...     - Expected a <class 'NoneType'>
    ...   Given value type: <class 'str'>
    ...   Given value: three''')
    "trainer.max_epochs: expected int or null, got 'three'."
    """
    # Of the types that were tried, the first that is a class with a mistake in its arguments is the one that was meant.
    tried = re.search(r"^( *-? *)Problem with given class_path '([\w.]+)':(.*)", message, re.M | re.S)
    reason = message if tried is None else re.split(rf"^{tried[1]}(?=\S)", tried[3], flags=re.M)[0]
    cls = tried[2] if tried is not None else (re.findall(r"class_path='([\w.]+)'", message) or [""])[0]
    cls = cls.rsplit(".", 1)[-1]
    key = (re.findall(r'^Parser key "([^"]+)"', message) or [""])[0]
    if missing := re.search(r"Requirement .* not met.*", reason):
        return f"{cls}: {missing[0]}"
    if option := re.search(r"Option '([^']+)' is not accepted", reason):
        return f"{key}: {cls} has no option {option[1]}; --{key}.help {cls} lists those it has."
    expected = [_readable(what) for what in re.findall(r"Expected a (?!path but)(.*)", reason)]
    value = re.search(r"(?:Given value|Got value|import path string): (.*?)(?:\. Got value: .*)?$", reason, re.M)
    if not key or not expected or value is None:
        return " ".join(message.split())
    key = ".".join(dict.fromkeys([key, *re.findall(r'Parser key "([^"]+)"', reason)]))
    if set(expected) <= {CLASS, "null"}:
        names = f"use one of {', '.join(known_divergences())}" if key.endswith("divergence") else "check its name"
        return f"{key}: there is no {value[1]}; {names}, or give the path to import it from."
    return f"{key}: expected {' or '.join(dict.fromkeys(expected))}, got {value[1]!r}."


CLASS = "the name of a class"


def _readable(what: str) -> str:
    what = what.split(". Got value")[0]
    if what.startswith("dot import path"):
        return CLASS
    if named := re.fullmatch(r"<class '(?:[\w.]+\.)?(\w+)'>", what):
        return "null" if named[1] == "NoneType" else named[1]
    return re.sub(r"typing\.Literal\[(.*)\]", lambda choices: choices[1].replace("'", ""), what)
