"""The one exception this pack raises for a mistake that its user can mend, and the reason of another."""


class UsageError(ValueError):
    """A setting, file or model that cannot work; the message names the culprit and the way out in one sentence.

    Command lines print the message without a traceback and exit with code 2.
    """


def check_count(name: str, value: int | None, least: int = 1) -> None:
    """Raise :class:`UsageError` unless a number that is given is at least so large."""
    if value is not None and value < least:
        raise UsageError(f"{name} must be {least} or more, got {value}.")


def first_line(error: BaseException) -> str:
    r"""What an error of a library says first, without a full stop, to stand in a sentence.

    >>> first_line(ValueError("It is no model.\nLong advice"))
    'It is no model'
    >>> first_line(KeyError("added_tokens"))
    "KeyError: 'added_tokens'"
    """
    lines = [*str(error).strip().split("\n"), ""]
    said = lines[0] + (f" {lines[1].strip()}" if lines[0].endswith(":") else "")
    said = said.rstrip(" .!:")
    telling = said and isinstance(error, OSError | ValueError | ImportError | RuntimeError)
    return said if telling else f"{type(error).__name__}: {said}".rstrip(" :")
