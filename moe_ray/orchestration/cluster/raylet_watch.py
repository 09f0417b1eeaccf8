"""Says that Ray's own process on this machine has ended, before that ends this process.

Ray ends a process whose store of objects is gone at once, with status 1 and without a word, whenever the next object is
touched; an exception that could be said in a sentence comes only where something else is noticed first.
"""

from __future__ import annotations

import logging
import os
import select
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import ray

logger = logging.getLogger(__name__)

ENDED = "Ray's own process on this machine (raylet) has ended; the same command goes on where this one stopped"


@contextmanager
def raylet_watched() -> Iterator[None]:
    """Logs `ENDED` as soon as the raylet that this process started ends within the context.

    Where that process or its end cannot be known (another system than Linux, a cluster that was there already), nothing is
    watched.
    """
    pid = _pid_of_raylet()
    try:
        ended = os.pidfd_open(pid) if pid else None
    except (AttributeError, OSError):  # no such call here, or it is gone already
        ended = None
    if ended is None:
        yield
        return
    reader, writer = os.pipe()
    thread = threading.Thread(target=_say, args=(ended, reader), name="raylet watch", daemon=True)
    thread.start()
    try:
        yield
    finally:
        os.close(writer)
        thread.join()
        os.close(reader)
        os.close(ended)


def _say(ended: int, over: int) -> None:
    waiting = select.poll()  # select takes no descriptors above 1023
    for descriptor in (ended, over):
        waiting.register(descriptor, select.POLLIN)
    ready = [descriptor for descriptor, _ in waiting.poll()]
    if over not in ready:
        logger.error(ENDED)


def _pid_of_raylet() -> int:
    """Of the raylet that this process started; 0 = there is none."""
    try:
        # Ray has no public way to ask for it.
        return int(ray._private.worker.global_worker.node.all_processes["raylet"][0].process.pid)
    except (AttributeError, LookupError):
        return 0
