"""Processes that each hold something that takes long to make, such as a judge, and work on blocks of rows.

They are Ray actors of our own and not a pool of Ray Data's: that hands its context and its plan to every actor through the
object store, and says itself, in an error line at each start, that a restart then fails once these are lost. These get their
arguments by value, so one that dies is started again wherever there is room, and its block is done again.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import ray

from moe_ray.errors import InputError
from moe_ray.orchestration.cluster.cluster_nodes import memory_to_ask
from moe_ray.orchestration.cluster.placement import ANYWHERE, Placement
from moe_ray.orchestration.cluster.ray_session import (
    require_cpus,
    require_gpus,
    resources_released,
    result_of,
)

_MOST_RESTARTS = 3
"""Of one process: what ends it once may be a machine that went away, what ends it four times is in the work itself."""


class BlockActor:
    """One process, as Ray runs it.

    What it holds is made at the first block: an error in a constructor would end the process without a word of why.

    Args:
        what: the work, as logs and the dashboard name the process.
        make: makes what works on a block.
        arguments: of `make`.
    """

    def __init__(self, what: str, make: Callable[..., Callable[[Any], Any]], arguments: tuple[Any, ...]) -> None:
        self._what, self._make, self._arguments = what, make, arguments
        self._work: Callable[[Any], Any] | None = None

    def __repr__(self) -> str:
        return self._what

    def do(self, block: Any) -> Any:
        """What is made of one block."""
        if self._work is None:
            self._work = self._make(*self._arguments)
        return self._work(block)


@contextmanager
def in_actors(
    blocks: Sequence[Any],
    make: Callable[..., Callable[[Any], Any]],
    arguments: tuple[Any, ...],
    *,
    what: str,
    num_actors: int,
    gpus_per_actor: float = 0.0,
    memory: int = 0,
    placement: Placement = ANYWHERE,
) -> Iterator[Iterator[Any]]:
    """Has actors work on the blocks; at the end of the context their GPUs and CPUs are free again.

    Args:
        blocks: what one call gets each.
        make: makes what works on a block, in each actor; such as a class.
        arguments: of `make`; small, since they travel by value.
        what: the work, for errors, warnings and the dashboard.
        num_actors: how many actors, at most one for each block.
        gpus_per_actor: a fraction of a GPU, one, or several.
        memory: bytes that each takes on the CPU, which Ray is asked for; 0 = nothing is asked for.
        placement: on which nodes.

    Yields:
        what an actor returned for a block, one after another, in any order of blocks.

    Raises:
        InputError: a local Ray has too few CPUs or GPUs, and the actors would wait for ever; or one ended again and again.
        MoeRayError: an actor raised it.
    """
    require_cpus(num_actors, what)
    require_gpus(num_actors * gpus_per_actor, what)
    placement.require(gpus_per_actor, what)
    kind = ray.remote(
        num_cpus=1,
        num_gpus=gpus_per_actor,
        max_restarts=_MOST_RESTARTS,
        max_task_retries=-1,
        scheduling_strategy="SPREAD",
        # Weights on a GPU are not in the node's memory.
        memory=0 if gpus_per_actor else memory_to_ask(memory),
        **placement.actor_options(gpus_per_actor),
    )(BlockActor)
    with resources_released(what):
        actors = [kind.remote(what, make, arguments) for _ in range(min(num_actors, len(blocks)))]
        try:
            yield _results(actors, blocks, what)
        finally:
            for actor in actors:
                ray.kill(actor)


def _results(actors: Sequence[Any], blocks: Sequence[Any], what: str) -> Iterator[Any]:
    todo, busy = iter(blocks), dict[Any, Any]()

    def give(actor: Any) -> None:
        for block in todo:
            busy[actor.do.options(name=what).remote(block)] = actor
            return

    for actor in actors:
        give(actor)
    while busy:
        (done,), _ = ray.wait(list(busy), num_returns=1)
        actor = busy.pop(done)
        try:
            result = result_of(done)
        except ray.exceptions.RayActorError as error:
            raise InputError(
                f"{what}: a process ended {_MOST_RESTARTS + 1} times, as it does where memory runs out; use fewer "
                "processes, or a smaller model"
            ) from error
        give(actor)
        yield result
