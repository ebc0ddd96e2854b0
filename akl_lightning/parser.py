"""A command-line parser whose errors and help are made to be read."""

import re
import sys
from difflib import get_close_matches
from itertools import pairwise
from pathlib import Path
from typing import Any, NoReturn

import yaml
from jsonargparse import ArgumentParser

from akl_lightning.compat import options_of

CLASS = "the name of a class"


class ParserExit(SystemExit):
    """A parser has said all that there is to say: help, a configuration, or a mistake."""

    code: int


class OneSentenceParser(ArgumentParser):
    """A parser that says what is wrong, not how all of its hundreds of options are spelled."""

    def format_help(self, *args: Any) -> str:
        """Leave out lists of classes that nobody reads: where a module may stand, all that torch has."""
        return re.sub(r",\s+known\s+subclasses:[^()]{2000,}(?=\))", "", super().format_help(*args))

    def parse_args(self, args: Any = None, *more: Any, **settings: Any) -> Any:
        """Name a ``--config`` that cannot be read, which jsonargparse does not."""
        words = [part for word in (sys.argv[1:] if args is None else args) for part in word.split("=", 1)]
        for option, value in pairwise(words):
            if option in ("--config", "-c") and Path(value).is_file():
                try:
                    yaml.compose(Path(value).read_text(encoding="utf-8"), yaml.SafeLoader)
                except (UnicodeDecodeError, yaml.YAMLError) as error:
                    self.error(f"{value} is no YAML: {error}")
        return super().parse_args(args, *more, **settings)

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Print the mistake and the way out, and exit with code 2."""
        if not self.exit_on_error:  # jsonargparse tries one type after another and catches what does not fit
            super().error(message, ex)
        message = one_sentence(message)
        if message.startswith("unrecognized arguments:") and (unknown := re.findall(r"(?<= )-[^\s=]+", message)):
            # Without what stands behind them, which may be a key.
            message = f"unrecognized arguments: {' '.join(unknown)}"
            close = get_close_matches(unknown[0], options_of(self), 1)
            message += "".join(f"; did you mean {name}?" for name in close)
        sys.stderr.write(f"error: {message}\n(--help lists the options)\n")
        raise ParserExit(2) from ex

    def exit(self, status: int = 0, message: str | None = None) -> NoReturn:
        """End the program with this code."""
        sys.stderr.write(message or "")
        raise ParserExit(status)


def one_sentence(message: str) -> str:
    """What jsonargparse says of a value, without the types that it has tried and their reasons.

    It says so in words alone. Where they are other words than those of the versions that are known here, all of them
    are kept, on one line.

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
    return _known(message) or " ".join(re.sub('^Parser key "(.*)":', r"\1:", message).split())


def _known(message: str) -> str | None:
    stated = re.match(r'Parser key "([^"]+)":(.*)', message, re.S)
    if stated is None:
        return None
    key, body = stated.groups()
    reasons = _reasons(body)
    # The first type is the one that was meant, but that a class may be given by its name alone; with options, a class.
    options = re.search(r"Given value: (Namespace|NestedArg)\(", body)
    reason = next((each for each in reasons if options and not each.startswith("Expected a ")), reasons[0])
    cls = re.findall(r"class_path='([\w.]+)'|$", reason if "class_path='" in reason else body)[0]
    problem = re.match(r"Problem with given class_path '([\w.]+)':\s*(.*)", reason, re.S)
    if problem:
        cls, reason = problem.groups()
    reason, callables = re.subn(r"Type typing\.Callable.* expects a function or a callable class: ", "", reason)
    if nested := re.search(r'Parser key ".*', reason if problem else body, re.S):
        inner = _known(nested[0])
        return inner and f"{key}.{inner.removeprefix(f'{key}.')}"
    if cls and (option := re.match(r"Option '([^']+)' is not accepted", reason)):
        name = cls.rpartition(".")[2]
        return f"{key}: {name} has no option {option[1]}; --{key}.help {name} lists those it has."
    expected = [_readable(what) for each in reasons for what in re.findall(r"Expected a (.*)", each)]
    value = re.search(r"(?:Got value|import path string): (.*)", reason) or re.search(r"Given value: (.*)", body)
    if reason.startswith("Expected a ") and value is not None:
        if CLASS in expected and set(expected) <= {CLASS, "Iterable", "bool", "null"}:
            from akl_lightning.divergences import known_divergences

            names = f"use one of {', '.join(known_divergences())}" if key.endswith("divergence") else "check its name"
            return f"{key}: there is no {value[1]}; {names}, or give the path to import it from."
        return f"{key}: expected {' or '.join(dict.fromkeys(expected))}, got {value[1].split('. Got value')[0]!r}."
    if problem or callables:
        found_where = "; PYTHONPATH=. lets one of this folder be found" if "No module named" in reason else ""
        return ": ".join(filter(None, (key, cls, " ".join(reason.split())))) + found_where
    return None


def _reasons(body: str) -> list[str]:
    """Why each type does not fit; where only one was tried, why that one does not."""
    tried = re.search(r"Errors:\n(.*?)(?=\n *Given value|$)", body, re.S)
    text = body if tried is None else tried[1]
    bullet = re.search(r"^ *- ", text, re.M)
    reasons = [text] if bullet is None else re.split(rf"^{bullet[0]}", text, flags=re.M)[1:]
    return [reason.strip() for reason in reasons if not reason.startswith("Expected a path")] or [text.strip()]


def _readable(what: str) -> str:
    what = what.split(". Got value")[0]
    if what.startswith("dot import path"):
        return CLASS
    if named := re.fullmatch(r"<class '(?:[\w.]+\.)?(\w+)'>", what):
        return "null" if named[1] == "NoneType" else named[1]
    return re.sub(r"typing\.Literal\[(.*)\]", lambda choices: choices[1].replace("'", ""), what)
