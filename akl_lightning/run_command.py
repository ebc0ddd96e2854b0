"""How a command ends: in one sentence where a user can mend it, and with the exit code of shells after Ctrl-C."""

import logging
import re
import sys
import warnings
from collections.abc import Callable
from contextlib import suppress
from functools import partial

from akl_lightning.errors import UsageError
from akl_lightning.interrupts import EXIT_CODE

LOST_PROCESSES = {
    "DataLoader worker": "a process that prepares batches died, often for want of memory: lower data.num_workers, and "
    "go on from the last checkpoint.",
    "Connection closed by peer": "another process of this run died: look at its messages, and go on from the last "
    "checkpoint.",
    "Connection reset by peer": "another process of this run died: look at its messages, and go on from the last "
    "checkpoint.",
}
"""What a RuntimeError of torch says when a process is gone, and what is said to the user instead."""


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
    # In transformers' generate, which has a mask, an answer that has ended is taken for padding without one.
    logger = logging.getLogger("transformers.modeling_utils")
    logger.addFilter(lambda record: "passing in an `attention_mask`" not in str(record.msg))
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
        except _mistakes() as error:
            sys.stderr.write(f"error: {error}\n")
            raise SystemExit(2) from error
        except RuntimeError as error:
            lost = [sentence for sign, sentence in LOST_PROCESSES.items() if sign in str(error)]
            if not lost:
                raise
            sys.stderr.write(f"error: {lost[0]}\n")
            raise SystemExit(2) from error


def _mistakes() -> tuple[type[Exception], ...]:
    """What a user can mend; Lightning's own only where something has imported it."""
    lightning = sys.modules.get("lightning.pytorch.utilities.exceptions")
    return (UsageError, OSError, *([lightning.MisconfigurationException] if lightning else []))


def _say(handler: logging.Handler, record: logging.LogRecord) -> None:
    sys.stderr.write(f"{handler.format(record)}\n")
