"""What is wrong with the rows of prompts, gathered so that a file with ten faults is mended in one go."""

from __future__ import annotations

from collections.abc import Iterable

from moe_ray.errors import InputError

_MAX_FAULTS_SHOWN = 20


class Faults:
    """What is wrong with rows, of which a message names the first ones."""

    def __init__(self) -> None:
        self._number, self._first = 0, list[str]()

    def add(self, text: str) -> None:
        """Adds a fault: location, field, and what is wrong."""
        self._number += 1
        if len(self._first) < _MAX_FAULTS_SHOWN:
            self._first.append(text)

    def add_repeated(self, ids: Iterable[str]) -> None:
        """Adds ids that were used before."""
        for name in ids:
            self.add(f"{name}: id: used twice; ids must be unique within a file name")

    def check(self) -> None:
        """Refuses the rows if any is wrong.

        Raises:
            InputError: with how many are wrong, and the first of them.
        """
        if self._number:
            shown, more = "\n  ".join(self._first), self._number - len(self._first)
            rest = f"\n  … and {more} more" if more else ""
            raise InputError(f"{self._number} wrong rows; mend or remove them:\n  {shown}{rest}")
