"""A copy of the model in the cluster, as the driver has it: one process, or a group that one of its processes leads."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import ray
from ray.util.placement_group import PlacementGroup, remove_placement_group

from moe_ray.config.model import ModelConfig
from moe_ray.orchestration.cluster.cluster_nodes import memory_to_ask
from moe_ray.orchestration.cluster.model_actor import LoadModel, ModelActor
from moe_ray.orchestration.cluster.model_group import in_bundle
from moe_ray.orchestration.cluster.placement import Placement


@dataclass(eq=False)
class PoolProcess:
    """What is called for work with the model.

    Attributes:
        actor: the process, or the leader of a group.
        place: of a group.
        loading: the call that loads the model; None = it was not made yet.
        is_ready: the model is there.
    """

    actor: Any
    place: PlacementGroup | None = None
    loading: Any = None
    is_ready: bool = False

    def end(self) -> None:
        """Ends it, with all that it leads."""
        ray.kill(self.actor)
        if self.place is not None:
            remove_placement_group(self.place)


def start_process(
    model: ModelConfig, load: LoadModel | None, *, placement: Placement, gpus: float, memory: int
) -> PoolProcess:
    """Starts one, or a group of as many as the model has shards; does not wait for it.

    Args:
        model: which one.
        load: see `ModelActor`.
        placement: on which nodes.
        gpus: of each process.
        memory: bytes of each process on the CPU, which Ray is asked for; 0 = nothing is asked for.
    """
    # Weights on a GPU are not in the node's memory.
    asked = 0 if gpus else memory_to_ask(memory)
    takes: dict[str, Any] = {"num_cpus": 1, "num_gpus": gpus, "memory": asked}
    restarts = {"max_restarts": -1, "max_task_retries": -1, "max_concurrency": 2}
    if model.num_shards == 1:
        kind = ray.remote(
            **takes,
            **restarts,
            # Over all nodes, as Ray Data places its actors; by default Ray fills the driver's node first.
            scheduling_strategy="SPREAD",
            **placement.actor_options(gpus),
        )(ModelActor)
        return PoolProcess(kind.remote(model, load))
    # All places of a group at once: two groups that had half of theirs each would wait for ever.
    place = placement.bundles(model.num_shards, gpus, asked)
    takes["resources"] = placement.resources(gpus)
    leader = ray.remote(**takes, **restarts, scheduling_strategy=in_bundle(place, 0))(ModelActor)
    return PoolProcess(leader.remote(model, load, takes), place)
