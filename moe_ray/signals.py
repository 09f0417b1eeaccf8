"""Ending on request: SIGTERM, as schedulers and `kill` send it, ends a run as Ctrl-C does."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType


class Terminated(KeyboardInterrupt):
    """The process was asked to end; a `KeyboardInterrupt`, so that everything is put away in the same manner."""


def end_on_sigterm() -> None:
    """Has SIGTERM raise `Terminated` in the main thread.

    To be called again after Ray was started: it sets a handler of its own, which writes a stack trace of C++ and ends the
    process without putting anything away.
    """
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, _raise)


@contextmanager
def interrupts_deferred() -> Iterator[None]:
    """SIGINT and SIGTERM within the context do at its end what they would have done; a second one does so at once.

    For what leaves something half done behind that ends the process in another way later.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    handlers = {number: handler for number, handler in before.items() if callable(handler)}
    came: list[int] = []

    def note(number: int, frame: FrameType | None) -> None:
        came.append(number)
        if len(came) > 1:
            handlers[signal.Signals(number)](number, frame)

    for number in handlers:
        signal.signal(number, note)
    try:
        yield
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
        if len(came) == 1:
            handlers[signal.Signals(came[0])](came[0], None)


def end_main_thread() -> None:
    """Ends the main thread's work as SIGTERM does, from another thread; nothing where `end_on_sigterm` is not in force.

    It is not SIGINT, which a command that was started in the background ignores.
    """
    if signal.getsignal(signal.SIGTERM) is _raise:
        signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGTERM)


def _raise(number: int, frame: FrameType | None) -> None:
    # A second signal, as impatient senders give it, must not break off what the first one made begin.
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    raise Terminated
