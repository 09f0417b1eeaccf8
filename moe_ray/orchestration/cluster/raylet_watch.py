"""Ends the work of this process as soon as Ray's own process on this machine has ended, with a word to say so.

Left to itself Ray tries for some seconds to recover what is lost, in lines of its own, and ends this process with status 1
and without a word when the next object is touched: its store is gone. An exception comes only where something else is
noticed first.
"""

from __future__ import annotations

import logging
import os
import select
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import ray

from moe_ray.signals import end_main_thread

logger = logging.getLogger(__name__)

ENDED = "Ray's own process on this machine (raylet) has ended; the same command goes on where this one stopped"


@dataclass
class RayletWatch:
    """Whether the raylet has ended."""

    has_ended: bool = False


@contextmanager
def raylet_watched(watch: RayletWatch) -> Iterator[None]:
    """When the raylet that this process started ends within the context, logs `ENDED` and interrupts the main thread.

    The interrupt is that of SIGTERM, so that everything is put away as after one; `has_ended` tells them apart.
    Where that process or its end cannot be known (another system than Linux, a cluster that was there already), nothing is
    watched.

    Args:
        watch: is told.
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
    thread = threading.Thread(target=_say, args=(watch, ended, reader), name="raylet watch", daemon=True)
    thread.start()
    try:
        yield
    finally:
        os.close(writer)
        thread.join()
        os.close(reader)
        os.close(ended)


def _say(watch: RayletWatch, ended: int, over: int) -> None:
    waiting = select.poll()  # select takes no descriptors above 1023
    for descriptor in (ended, over):
        waiting.register(descriptor, select.POLLIN)
    ready = [descriptor for descriptor, _ in waiting.poll()]
    if over not in ready:
        watch.has_ended = True
        logger.error(ENDED)
        end_main_thread()


def _pid_of_raylet() -> int:
    """Of the raylet that this process started; 0 = there is none."""
    try:
        # Ray has no public way to ask for it.
        return int(ray._private.worker.global_worker.node.all_processes["raylet"][0].process.pid)
    except (AttributeError, LookupError):
        return 0
