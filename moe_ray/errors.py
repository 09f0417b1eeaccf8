"""Errors by whose turn it is: the user's, the outside's, or ours.

Workflows print an error of this tree as one line, without a traceback, and exit with a status that scripts can act on;
every other exception is a bug and keeps its traceback.
"""

from __future__ import annotations


class MoeRayError(Exception):
    """Everything that moe-ray raises on purpose; the message says what was got, what was expected and what to do."""


class InputError(MoeRayError, ValueError):
    """Input, configuration or data that moe-ray cannot work with: the user's to mend."""


class NothingSelected(InputError):
    """The settings leave no expert selected, or nothing to train."""


class NotTrainable(InputError):
    """Settings under which training cannot go on: in a sweep a result like any other."""


class NotFinite(InputError):
    """Hidden states with infinite or undefined values: of one example, or of a model in the wrong type."""


class OutsideFailed(MoeRayError):
    """A judge endpoint, a tracking server or storage did not do its part; the same call may work later."""


class FrozenChanged(MoeRayError):
    """Training changed a parameter that must stay as it was: a fault of moe-ray; what was learned must not be used."""
