"""Progress of long calls: a callback, and a bar for people who wait."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol


class Progress(Protocol):
    """Called now and then while long work goes on, and once at its end."""

    def __call__(self, done: int, total: int, /) -> object:
        """`done` of `total` units are finished."""


@contextmanager
def shown(progress: bool | Progress, what: str) -> Iterator[Progress]:
    """What a `progress` argument asks for: a bar (True), nothing (False), or the callback that it is.

    Args:
        progress: of the caller.
        what: what is done, for the bar.
    """
    if not isinstance(progress, bool):
        yield progress
    elif not progress:
        yield _silent
    else:
        # A dependency of transformers, wanted only here.
        from tqdm.auto import tqdm

        with tqdm(desc=what) as bar:

            def show(done: int, total: int, /) -> None:
                bar.total = total
                bar.update(done - bar.n)

            yield show


def _silent(done: int, total: int, /) -> None:
    """Shows nothing."""
