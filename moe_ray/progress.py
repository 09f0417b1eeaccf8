"""Progress of long calls: a callback, and for people who wait a bar, or lines where a bar cannot be drawn."""

from __future__ import annotations

import importlib.util
import sys
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Protocol

_LINES = 10
"""Lines of a long call at most, where no bar can be drawn, and one every so many seconds besides."""
_SECONDS = 60.0


class Progress(Protocol):
    """Called now and then while long work goes on, and once at its end."""

    def __call__(self, done: int, total: int, /) -> object:
        """`done` of `total` units are finished."""


@contextmanager
def shown(progress: bool | Progress, what: str) -> Iterator[Progress]:
    """What a `progress` argument asks for: a bar (True), nothing (False), or the callback that it is.

    In a notebook the bar is rich's, where rich is installed. Output that goes into a file gets a line for every tenth.

    Args:
        progress: of the caller.
        what: what is done, for the bar.
    """
    if not isinstance(progress, bool):
        yield progress
    elif not progress:
        yield _silent
    else:
        with _bar(what) as show:
            yield show


def _bar(what: str) -> AbstractContextManager[Progress]:
    if _in_notebook() and importlib.util.find_spec("rich") is not None:
        return _rich_bar(what)
    return _terminal_bar(what) if sys.stderr.isatty() else _lines(what)


def _in_notebook() -> bool:
    """Whether this process is a notebook's kernel; nothing of IPython is imported to find out."""
    ipython = sys.modules.get("IPython")
    shell = None if ipython is None else ipython.get_ipython()
    return shell is not None and "IPKernelApp" in shell.config


@contextmanager
def _rich_bar(what: str) -> Iterator[Progress]:
    from rich.console import Console
    from rich.progress import Progress as Bars

    # A console of its own: what others have made of the shared one, such as a live display, would get in the way.
    with Bars(console=Console()) as bars:
        task = bars.add_task(what, total=None)
        yield lambda done, total, /: bars.update(task, completed=done, total=total)


@contextmanager
def _terminal_bar(what: str) -> Iterator[Progress]:
    # A dependency of transformers, wanted only here.
    from tqdm import tqdm

    with tqdm(desc=what) as bar:

        def show(done: int, total: int, /) -> None:
            bar.total = total
            bar.update(done - bar.n)

        yield show


@contextmanager
def _lines(what: str) -> Iterator[Progress]:
    said, at = -1, time.monotonic()

    def show(done: int, total: int, /) -> None:
        nonlocal said, at
        part = _LINES * done // total if total else _LINES
        if part > said or time.monotonic() - at > _SECONDS:
            said, at = part, time.monotonic()
            print(f"{what}: {100 * done // total if total else 100}% {done}/{total}", file=sys.stderr, flush=True)  # noqa: T201

    yield show


def _silent(done: int, total: int, /) -> None:
    """Shows nothing."""
