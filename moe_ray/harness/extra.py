"""The packages of the extra `moe-ray[harness]`, imported where they are used."""

from __future__ import annotations

import importlib
from importlib import metadata
from importlib.util import find_spec
from typing import Any

from moe_ray.errors import InputError

DISTRIBUTIONS = {"lm_eval": "lm-eval", "inspect_ai": "inspect-ai"}


def require(module: str, what: str) -> None:
    """Refuses work whose package is not installed; imports nothing.

    Args:
        module: `lm_eval` or `inspect_ai`.
        what: the setting or command that needs it.

    Raises:
        InputError: it is not there.
    """
    if find_spec(module) is None:
        raise InputError(
            f"{what} needs {DISTRIBUTIONS[module]}, which is not installed; pip install 'moe-ray[harness]'"
        )


def imported(name: str) -> Any:
    """The module of a package of the extra."""
    return importlib.import_module(name)


def version_of(module: str) -> str:
    """The package's version, on which a task's meaning depends."""
    return metadata.version(DISTRIBUTIONS[module])
