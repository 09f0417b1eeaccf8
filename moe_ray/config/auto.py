"""Numbers that a run decides when it has seen the machines: `auto` until then, see `moe_ray.resources.decide`."""

from __future__ import annotations

from typing import Literal, TypeVar

Auto = Literal["auto"]
"""Stands for a number that depends on the machines."""

_Number = TypeVar("_Number", int, float)


def number_of(value: _Number | Auto, *, undecided: _Number) -> _Number:
    """A setting's number.

    Args:
        value: of the setting.
        undecided: what `auto` means where no run has decided, as in a stage that is called by itself.
    """
    return undecided if isinstance(value, str) else value


def gpus_of(value: float | Auto) -> float:
    """GPUs of a process; none where no run has decided."""
    return number_of(value, undecided=0.0)


def processes_of(value: int | Auto) -> int:
    """How many processes; one where no run has decided."""
    return number_of(value, undecided=1)
