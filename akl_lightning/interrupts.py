"""Ctrl-C in a command: no traceback, and the exit code of shells. Imported first, as other imports take seconds."""

import sys
from collections.abc import Callable
from types import TracebackType

EXIT_CODE = 130
"""128 + SIGINT."""

_show: Callable[[type[BaseException], BaseException, TracebackType | None], object] = sys.excepthook


def _show_all_but_interrupts(kind: type[BaseException], error: BaseException, traceback: TracebackType | None) -> None:
    if issubclass(kind, KeyboardInterrupt):
        sys.stderr.write("interrupted\n")  # Python then ends as one that SIGINT has ended
    else:
        _show(kind, error, traceback)


# What a notebook does with an error is not this hook's to say.
sys.excepthook = _show_all_but_interrupts
