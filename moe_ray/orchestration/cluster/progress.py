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


class _Meter:
    """Counts finished units."""

    def __init__(self, what: str, total: int, bar: Progress | None) -> None:
        self.what, self.total, self.bar = what, total, bar
        self.done = 0
        self._last_line = time.monotonic()
        self._task = bar.add_task(what, total=total) if bar is not None else None

    def advance(self, units: int = 1) -> None:
        """Some more units are done."""
        self.done += units
        if self.bar is not None and self._task is not None:
            self.bar.update(self._task, completed=self.done)
        elif time.monotonic() - self._last_line > _SECONDS_BETWEEN_LINES and self.done < self.total:
            self._last_line = time.monotonic()
            logger.info("%s: %d of %d", self.what, self.done, self.total)


@contextmanager
def progress(what: str, total: int) -> Iterator[_Meter]:
    """A meter for `total` units of work."""
    if not sys.stderr.isatty():
        yield _Meter(what, total, None)
        return
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, TimeRemainingColumn(), console=Console(stderr=True)) as bar:
        yield _Meter(what, total, bar)
