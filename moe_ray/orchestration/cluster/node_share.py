"""How many of a job's processes share a node's cores.

Processes of models are spread over the nodes (`SPREAD`), so their number on a node is known without asking where each is;
and it stays as it is when one dies, so that a process started in its place computes with as many threads, to the same digit.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import ray


def processes_on_this_node(num_processes: int) -> int:
    """How many of `num_processes` like this one are expected on this node; at least 1.

    A driver, which holds no resources of Ray's, counts as the only one of its kind.

    Args:
        num_processes: on all nodes together.
    """
    if not ray.is_initialized() or ray.get_runtime_context().worker.mode != ray.WORKER_MODE:
        return 1
    context = ray.get_runtime_context()
    return expected_on_node(num_processes, context.get_assigned_resources(), ray.nodes(), context.get_node_id())


def expected_on_node(
    num_processes: int, needs: Mapping[str, float], nodes: Sequence[Mapping[str, Any]], node_id: str
) -> int:
    """How many processes a node gets when they are spread over all nodes that have room for one; at least 1.

    Args:
        num_processes: on all nodes together.
        needs: what one process holds, by resource.
        nodes: as `ray.nodes()` describes them.
        node_id: the node in question.
    """
    rooms = {
        str(node["NodeID"]): room for node in nodes if node["Alive"] if (room := _room(node["Resources"], needs)) > 0
    }
    if not rooms:
        return max(1, num_processes)
    even = math.ceil(num_processes / len(rooms))
    here = rooms.get(node_id, 1)
    # Nodes that cannot take an even share leave more for those that can.
    left_by_others = sum(max(0, even - room) for name, room in rooms.items() if name != node_id)
    return max(1, min(here, num_processes, even + left_by_others))


def _room(has: Mapping[str, float], needs: Mapping[str, float]) -> int:
    """How many such processes a node has room for."""
    wanted = {name: amount for name, amount in needs.items() if amount > 0 and name in ("CPU", "GPU")}
    # A kind of GPU is a resource that nodes without it lack; how much of it there is says nothing.
    if any(name.startswith("accelerator_type:") and not has.get(name) for name in needs):
        return 0
    if not wanted:
        return 10**9
    return min(int(has.get(name, 0) / amount + 1e-9) for name, amount in wanted.items())
