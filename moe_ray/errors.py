"""Errors by whose turn it is: the user's, the outside's, or ours. Every exception that is none of these is a fault of ours.

The command line prints them without a traceback; `moe_ray.cli.main` says which exit status each has.
"""

from __future__ import annotations


class MoeRayError(Exception):
    """An error whose message is enough: what was wrong, what was got, what was expected and what to do."""


class InputError(MoeRayError, ValueError):
    """Input, configuration or data that moe-ray cannot work with; the user's to mend."""


class NothingSelected(InputError):
    """No expert is selected, or there is nothing to train."""


class NotFinite(InputError):
    """Hidden states with infinite or undefined values: of one example, or of a model in the wrong type."""


class OutsideFailed(MoeRayError):
    """The judge endpoint, the tracking server or the storage failed; the same command may succeed later."""


class FrozenChanged(MoeRayError):
    """Training changed something that must stay frozen; a fault of ours."""
