"""Whether the Hugging Face hub is to be asked for a name, so that nobody waits minutes for one that cannot be had."""

import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import lru_cache
from pathlib import Path
from threading import Event, Thread

from huggingface_hub import constants, get_session, is_offline_mode
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id

ANSWER_SECONDS = 10
"""How long the hub may take to give any answer. Its library tries again and again, for minutes."""


def out_of_reach(source: str) -> bool:
    """Whether a name is to be looked for in the hub's cache alone.

    Args:
        source: a path, or a name of the hub.

    Returns:
        True for what is no path and cannot be a name, and for every name while the hub gives no answer.
    """
    if Path(source).exists():  # whose code may well be on the hub
        return False
    try:
        validate_repo_id(source)
    except HFValidationError:
        return True
    return not _hub_answers(int(time.monotonic() // 60))


@contextmanager
def hub_if_it_answers(source: str) -> Iterator[None]:
    """Let nothing be asked of the hub where it gives no answer; libraries then look into its cache."""
    before = constants.HF_HUB_OFFLINE
    constants.HF_HUB_OFFLINE = before or out_of_reach(source)
    try:
        yield
    finally:
        constants.HF_HUB_OFFLINE = before


@lru_cache(maxsize=1)
def _hub_answers(minute: int) -> bool:
    """Asked once a minute at most, in which a model's config, weights and tokenizer are looked for."""
    if is_offline_mode():
        return False
    answered = Event()

    def ask() -> None:
        with suppress(Exception):
            get_session().head(constants.ENDPOINT, timeout=ANSWER_SECONDS)
            answered.set()

    asking = Thread(target=ask, daemon=True)  # for looking up the host's name knows no time limit
    asking.start()
    asking.join(ANSWER_SECONDS)
    return answered.is_set()
