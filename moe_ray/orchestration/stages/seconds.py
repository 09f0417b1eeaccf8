"""Where the time of a run goes: what is waited for while processes start, and what is worked on, of everything in turn."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

from moe_ray.storage.stage import Outcome

START = "start_seconds"
"""Key of a stage's notes: how many of its seconds it waited for processes to start."""


@dataclass
class Spent:
    """Seconds of one part of a run.

    Attributes:
        total: all of them.
        start: those of the total that were waited for processes, imports included.
        is_reused: an earlier run spent them.
    """

    total: float = 0.0
    start: float = 0.0
    is_reused: bool = False


class Seconds:
    """The account of one run. Parts that lie in another one count there no more.

    Args:
        began: the moment on `time.perf_counter` that the user's wait began; None = now.
    """

    def __init__(self, began: float | None = None) -> None:
        self.began = time.perf_counter() if began is None else began
        self.parts: dict[str, Spent] = {}
        self._open: list[str] = []

    @contextmanager
    def spent_on(self, name: str, *, is_start: bool = False) -> Iterator[None]:
        """Counts what the context takes; several contexts of one name add up.

        Args:
            name: of the part.
            is_start: it is all waiting for processes.
        """
        began = time.perf_counter()
        try:
            yield
        finally:
            self.add(name, time.perf_counter() - began, is_start=is_start)

    def add(self, name: str, seconds: float, *, is_start: bool = False) -> None:
        """Counts seconds that were spent now."""
        part = self.parts.setdefault(name, Spent())
        part.total += seconds
        part.start += seconds if is_start else 0.0

    @contextmanager
    def stage(self, name: str) -> Iterator[list[Outcome]]:
        """Counts a stage, whose outcome is put into the list that is yielded; a stage in another one's work counts once."""
        outer = self._open[-1] if self._open else None
        self._open.append(name)
        done: list[Outcome] = []
        try:
            yield done
        finally:
            self._open.pop()
        for outcome in done:
            start = float(outcome.notes.get(START, 0.0))
            inside = self.parts.get(name, Spent()) if not outcome.is_reused else Spent()
            self.parts.pop(name, None)  # behind the parts that lie in it
            self.parts[name] = Spent(outcome.seconds + inside.total, start + inside.start, outcome.is_reused)
            if outer is not None and not outcome.is_reused:
                around = self.parts.setdefault(outer, Spent())
                around.total -= outcome.seconds
                around.start -= start

    def so_far(self) -> Mapping[str, Spent]:
        """Every part in turn, and what lay between them as `other`; those that were spent now add up to the total."""
        total = time.perf_counter() - self.began
        counted = [part for part in self.parts.values() if not part.is_reused]
        other = Spent(total - sum(part.total for part in counted))
        return {**self.parts, "other": other, "total": Spent(total, sum(part.start for part in counted))}
