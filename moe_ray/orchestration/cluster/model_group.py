"""Processes that hold one copy of the model together: the leader, which the pool calls, and those that it starts beside it.

To the pool the group is one process. Ray ends the others with the leader, which owns them; and where another one dies, the
leader ends itself, since every pass would wait for the dead one. Then Ray starts the leader again, it starts the others,
and its call is repeated, as after the death of a process that has the whole model.

The driver starts leaders before it has imported torch itself, so this module leaves that to them.
"""

from __future__ import annotations

import importlib
import os
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, wait
from dataclasses import replace
from typing import TYPE_CHECKING, Any, TypeVar, cast

import ray
from ray.util.placement_group import PlacementGroup
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from moe_ray.config.model import ModelConfig
from moe_ray.errors import MoeRayError

if TYPE_CHECKING:
    from moe_ray.orchestration.cluster.group_holder import LeadingHolder, Meeting

T = TypeVar("T")

_DEATH_SEEN_WITHIN = 30.0
"""Seconds after which Ray has told of a process's death, which looks like a connection that broke until then."""


class Follower:
    """A process that holds a part of the model, as Ray runs it."""

    def __init__(self) -> None:
        importlib.import_module("moe_ray.orchestration.cluster.group_holder")

    def serve(self, model: ModelConfig, meeting: Meeting) -> None:
        """Loads its part and takes part in the leader's passes; ends with the leader."""
        from moe_ray.orchestration.cluster.group_holder import serve

        serve(model, meeting)


class ModelGroup:
    """The leader's view of its group. Made in a process that Ray has placed in a bundle of a placement group.

    Args:
        model: which one; its `num_shards` is the number of bundles.
        options: arguments of `ray.remote` for each of the others: what it takes.
    """

    def __init__(self, model: ModelConfig, options: Mapping[str, Any]) -> None:
        self._ended: Future[None] = Future()
        self._serving: list[ray.ObjectRef] = []
        place = ray.util.get_current_placement_group()
        self._followers = [
            ray.remote(**options, max_restarts=0, max_task_retries=0, scheduling_strategy=in_bundle(place, rank))(
                Follower
            ).remote()
            for rank in range(1, model.num_shards)
        ]

    def load(self, model: ModelConfig, num_processes: int) -> LeadingHolder:
        """Meets the others and loads the model with them.

        Args:
            model: which one.
            num_processes: how many groups share this node's cores.

        Raises:
            InputError: the checkpoint cannot be loaded, or not sharded.
        """
        from moe_ray.orchestration.cluster.group_holder import LeadingHolder, join, open_meeting

        store, meeting = open_meeting(ray.util.get_node_ip_address(), model.num_shards)
        for rank, follower in enumerate(self._followers, start=1):
            serving = follower.serve.remote(model, replace(meeting, rank=rank))
            self._serving.append(serving)
            serving.future().add_done_callback(self._notice)
        join(meeting, store)
        return LeadingHolder(model, num_processes)

    def _notice(self, serving: Future[None]) -> None:
        """Called when another process ended, or ended its work with an error."""
        error = serving.exception()
        if isinstance(error, ray.exceptions.RayActorError):
            os._exit(1)
        if not self._ended.done():
            self._ended.set_exception(_cause(error))

    def attend(self, work: Callable[[], T]) -> T:
        """Does work that the others take part in; ends this process where one of them dies meanwhile.

        Raises:
            Exception: the work raised it, or another process did, for which this one would wait for ever.
        """
        done: Future[T] = Future()

        def run() -> None:
            try:
                done.set_result(work())
            except BaseException as error:
                done.set_exception(error)

        threading.Thread(target=run, daemon=True).start()
        either: list[Future[Any]] = [done, self._ended]
        first = done if done in wait(either, return_when=FIRST_COMPLETED).done else self._ended
        error = first.exception()
        if error is not None and _may_be_a_death(error):
            self._await_death()
        return cast(T, first.result())

    def _await_death(self) -> None:
        """Ends this process if another one turns out to be dead."""
        deadline = time.monotonic() + _DEATH_SEEN_WITHIN
        waiting: Sequence[ray.ObjectRef] = self._serving
        while waiting and time.monotonic() < deadline:
            # `_notice` ends this process.
            _, waiting = ray.wait(list(waiting), num_returns=len(waiting), timeout=0.5)


def in_bundle(place: PlacementGroup | None, rank: int) -> PlacementGroupSchedulingStrategy:
    """Where the group's process of this rank goes."""
    return PlacementGroupSchedulingStrategy(place, placement_group_bundle_index=rank)


def _cause(error: BaseException | None) -> BaseException:
    """What a process raised, without Ray's report of where."""
    if isinstance(error, ray.exceptions.RayTaskError) and isinstance(error.cause, MoeRayError):
        return error.cause
    return RuntimeError("a process of a group left its work; this is a fault of ours") if error is None else error


def _may_be_a_death(error: BaseException) -> bool:
    from moe_ray.models.joint_passes import PassBroken

    return not isinstance(error, MoeRayError) or isinstance(error, PassBroken)
