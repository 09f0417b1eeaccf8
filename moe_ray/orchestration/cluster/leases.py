"""Work that processes must not do at the same time: who begins it leases its name, and the others wait.

A lease ends when its holder gives it back, or has not been heard of for a while, so a process that dies holds nobody up.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import ray

_SECONDS_OF_A_LEASE = 60.0
_SECONDS_BETWEEN_RENEWALS = 10.0
_SECONDS_BETWEEN_QUESTIONS = 1.0


class Leases:
    """Who leases what; times are by one clock, so that it does not matter what other machines' clocks show.

    Args:
        seconds: how long a lease lasts that is not renewed.
    """

    def __init__(self, seconds: float = _SECONDS_OF_A_LEASE) -> None:
        self._seconds = seconds
        self._held: dict[str, tuple[str, float]] = {}

    def take(self, name: str, holder: str) -> bool:
        """Leases or renews; whether the holder has the lease now."""
        now = time.monotonic()
        other, until = self._held.get(name, (holder, now))
        if other != holder and now < until:
            return False
        self._held[name] = (holder, now + self._seconds)
        return True

    def give_back(self, name: str, holder: str) -> None:
        """Ends the holder's lease."""
        if self._held.get(name, ("", 0.0))[0] == holder:
            del self._held[name]


def start_leases() -> Any:
    """A process that keeps the leases of a piece of work; it ends when nobody has its handle any more."""
    return ray.remote(num_cpus=0)(Leases).remote()


@contextmanager
def leased(leases: Any, name: str, holder: str) -> Iterator[None]:
    """Waits for the lease and has it inside this context.

    Args:
        leases: from `start_leases`; None = nobody works at the same time.
        name: of the work.
        holder: a name that no other process has.
    """
    if leases is None:
        yield
        return
    while not ray.get(leases.take.remote(name, holder)):
        time.sleep(_SECONDS_BETWEEN_QUESTIONS)
    ended = threading.Event()

    def renew() -> None:
        while not ended.wait(_SECONDS_BETWEEN_RENEWALS):
            ray.get(leases.take.remote(name, holder))

    renewing = threading.Thread(target=renew, daemon=True)
    renewing.start()
    try:
        yield
    finally:
        ended.set()
        renewing.join()
        ray.get(leases.give_back.remote(name, holder))
