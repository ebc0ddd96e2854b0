"""The one exception this pack raises for a mistake that its user can mend."""


class UsageError(ValueError):
    """A setting, file or model that cannot work; the message names the culprit and the way out in one sentence.

    Command lines print the message without a traceback and exit with code 2.
    """
