"""Actors that are each handed their next work when they are done with one, so that its size can follow what was measured.

Ray Data, which drives the other jobs, plans all blocks before the first of them is worked on, and spends some twenty
milliseconds of the driver on each.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import ray

from moe_ray.errors import MoeRayError
from moe_ray.orchestration.cluster.ray_session import is_local, require_cpus, resources_released

_CALLS_AT_ONCE = 2


@contextmanager
def fed_actors(
    actor: type,
    arguments: tuple[Any, ...],
    next_work: Callable[[], Any],
    *,
    what: str,
    num_actors: int,
    max_actors: int = 0,
    gpus_per_actor: float = 0.0,
) -> Iterator[Iterator[Any]]:
    """Has actors work on what `next_work` gives; at the end of the context their GPUs and CPUs are free again.

    An actor is called for its next work while it works on one, so it must be thread-safe. One that dies is started again
    and called for the same work.

    Args:
        actor: its objects are called with one piece of work and return a result.
        arguments: of its constructor; small, since Ray keeps them to start an actor again.
        next_work: what to do next, asked for when an actor is free; None = nothing is left.
        what: the work, for errors and warnings.
        num_actors: the least number of actors.
        max_actors: the greatest, where the cluster has room; 0 = always `num_actors`.
        gpus_per_actor: a fraction of a GPU, one, or several.

    Yields:
        results, in the order in which they are ready. What an actor raised is raised here.

    Raises:
        InputError: a local Ray has too few CPUs, and the actors would wait for ever.
    """
    require_cpus(num_actors, what)
    with resources_released(what):
        worker = ray.remote(_Worker).options(
            num_cpus=1,
            num_gpus=gpus_per_actor or None,
            max_concurrency=_CALLS_AT_ONCE,
            max_restarts=-1,
            max_task_retries=-1,
            scheduling_strategy="SPREAD",
        )
        actors = [worker.remote(actor, arguments) for _ in range(_with_room(num_actors, max_actors, gpus_per_actor))]
        try:
            yield _results(actors, next_work)
        finally:
            for handle in actors:
                ray.kill(handle)


def _with_room(num_actors: int, max_actors: int, gpus_per_actor: float) -> int:
    """How many actors are asked for: on a Ray of this machine alone those beyond `num_actors` must find room there."""
    if not is_local():
        return max(num_actors, max_actors)
    resources = ray.cluster_resources()
    room = resources.get("GPU", 0.0) / gpus_per_actor if gpus_per_actor else resources.get("CPU", 0.0)
    return max(num_actors, min(max_actors, int(room)))


def _results(actors: list[Any], next_work: Callable[[], Any]) -> Iterator[Any]:
    """Yields results while there is work; an actor gets its first when it is ready for it."""
    # Each result is put here when it is there, so that the driver never looks through all the calls in flight.
    done: queue.SimpleQueue[tuple[Any, Any, bool]] = queue.SimpleQueue()

    def call(handle: Any, method: Any, *work: Any, is_work: bool) -> None:
        method.remote(*work).future().add_done_callback(lambda future: done.put((handle, future, is_work)))

    for handle in actors:
        call(handle, handle.start, is_work=False)
    in_flight, has_more = 0, True
    while has_more or in_flight:
        handle, future, is_work = done.get()
        try:
            result = future.result()
        except ray.exceptions.RayTaskError as error:
            if isinstance(error.cause, MoeRayError):
                raise error.cause from None
            raise
        in_flight -= is_work
        if is_work:
            # First, so that what it says can decide what comes next.
            yield result
        for _ in range(1 if is_work else _CALLS_AT_ONCE):
            work = next_work() if has_more else None
            has_more = has_more and work is not None
            if work is not None:
                call(handle, handle.work, work, is_work=True)
                in_flight += 1


class _Worker:
    """A process with one of the actors' objects, made when it is first needed, so that its errors are those of a call."""

    def __init__(self, actor: type, arguments: tuple[Any, ...]) -> None:
        self._make, self._arguments = actor, arguments
        self._object: Any = None
        self._lock = threading.Lock()

    def start(self) -> None:
        """Makes the object."""
        with self._lock:
            if self._object is None:
                self._object = self._make(*self._arguments)

    def work(self, work: Any) -> Any:
        """What the object says to this work."""
        # A process that was started again has not been asked to start.
        self.start()
        return self._object(work)
