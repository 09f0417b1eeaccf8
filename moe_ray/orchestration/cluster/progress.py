"""Progress of long work: a bar on a terminal, a line now and then in a log."""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

logger = logging.getLogger(__name__)

_SECONDS_BETWEEN_LINES = 5.0
_WIDTH_OF_BAR = 10
"""Characters: with the longest name, both times and a note it all fits into a line of 80."""


class Meter:
    """Counts finished units.

    Args:
        what: is done.
        total: units; None = not known yet.
        bar: shows it; None = lines of the log do.
        unit: what is counted, for the log; empty = nothing is said of it.
    """

    def __init__(self, what: str, total: int | None, bar: Progress | None, *, unit: str = "") -> None:
        self.what, self.total, self.bar = what, total, bar
        self.done = 0
        self._unit = f" {unit}" if unit else ""
        self._last_line = time.monotonic()
        self._task = bar.add_task(what, total=total, note="") if bar is not None else None

    def advance(self, units: int = 1) -> None:
        """Some more units are done."""
        self.show(self.done + units)

    def show(self, done: int, *, total: int | None = None, note: str = "") -> None:
        """So many units are done.

        Args:
            done: of all units.
            total: where it is known only now.
            note: figures to show beside it.
        """
        self.done, self.total = done, self.total if total is None else total
        if self.bar is not None and self._task is not None:
            self.bar.update(self._task, completed=done, total=self.total, note=note)
        elif time.monotonic() - self._last_line > _SECONDS_BETWEEN_LINES and (self.total is None or done < self.total):
            self._last_line = time.monotonic()
            of = "" if self.total is None else f" of {self.total}"
            logger.info("%s: %d%s%s%s", self.what, done, of, self._unit, f"; {note}" if note else "")


@contextmanager
def progress(what: str, total: int | None, *, unit: str = "") -> Iterator[Meter]:
    """A meter for `total` units of work.

    Args:
        what: is done.
        total: units; None = the work itself says how many.
        unit: what is counted, for the log.
    """
    if not sys.stderr.isatty():
        yield Meter(what, total, None, unit=unit)
        return
    columns = (
        TextColumn("{task.description}"),
        BarColumn(bar_width=_WIDTH_OF_BAR),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[note]}"),
    )
    with Progress(*columns, console=Console(stderr=True)) as bar:
        yield Meter(what, total, bar, unit=unit)
