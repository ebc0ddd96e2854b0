"""The one exception this pack raises for a mistake that its user can mend, and the reason of another."""


class UsageError(ValueError):
    """A setting, file or model that cannot work; the message names the culprit and the way out in one sentence.

    Command lines print the message without a traceback and exit with code 2.
    """


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
