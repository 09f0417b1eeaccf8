"""The one error that is the user's to mend, as opposed to a fault of ours."""

from __future__ import annotations


class InputError(ValueError):
    """Input, configuration or data that moe-ray cannot work with.

    The message says what was wrong, what was got, what was expected and what to do. Workflows print it without a
    traceback and exit with status 2; every other exception is a bug and keeps its traceback.
    """


class NotFinite(InputError):
    """Hidden states with infinite or undefined values: of one example, or of a model in the wrong type."""
