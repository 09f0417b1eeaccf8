"""Ending on request: SIGTERM, as schedulers and `kill` send it, ends a run as Ctrl-C does."""

from __future__ import annotations

import signal
import threading
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
