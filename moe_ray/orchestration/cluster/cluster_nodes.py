"""The machines of the cluster as numbers, and how much memory a process asks Ray for."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from moe_ray.orchestration.cluster.ray_session import is_local
from moe_ray.resources.nodes import GB, KNOWN_GPUS, Node, gpus_here, memory_here

_ANSWER_SECONDS = 30.0
_KIND = "accelerator_type:"


def cluster_nodes(
    fits: Callable[[Mapping[str, Any]], bool] = lambda node: True,
    has_gpus: Callable[[Mapping[str, Any]], bool] = lambda node: True,
) -> list[Node]:
    """The nodes that are there now; each with GPUs is asked how much memory they have.

    Args:
        fits: whether processes that hold a model may be on a node, as `ray.nodes()` describes it.
        has_gpus: whether they may have its GPUs.
    """
    alive = [
        node if has_gpus(node) else {**node, "Resources": {**node["Resources"], "GPU": 0.0}}
        for node in ray.nodes()
        if node["Alive"] and fits(node)
    ]
    answers = _ask_gpus([node for node in alive if node["Resources"].get("GPU")])
    nodes = [describe_node(node["Resources"], answers.get(node["NodeID"], (0, None, ""))) for node in alive]
    if is_local():
        nodes = [replace(node, memory=memory_here()) for node in nodes]
    return nodes


def describe_node(resources: Mapping[str, float], answer: tuple[int, int | None, str]) -> Node:
    """A node from its resources in Ray, and what it says of its GPUs where it can.

    Args:
        resources: as `ray.nodes()` has them; what Ray calls memory is what it found free, less its object store.
        answer: from `gpus_here`.
    """
    _, gpu_memory, name = answer
    kind = next((key.removeprefix(_KIND) for key in resources if key.startswith(_KIND)), "")
    if gpu_memory is None and kind in KNOWN_GPUS:
        gpu_memory = KNOWN_GPUS[kind] * GB
    return Node(
        cpus=resources.get("CPU", 0.0),
        memory=int(resources.get("memory", 0.0) + resources.get("object_store_memory", 0.0)),
        gpus=int(resources.get("GPU", 0.0)),
        gpu_memory=gpu_memory,
        gpu_name=kind or name,
    )


def _ask_gpus(nodes: list[dict[str, Any]]) -> dict[str, tuple[int, int | None, str]]:
    """By node id; nodes that do not answer in time are left out."""
    ask = ray.remote(num_cpus=0, max_retries=0)(gpus_here)
    asked = {
        ask.options(scheduling_strategy=NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)).remote(): node[
            "NodeID"
        ]
        for node in nodes
    }
    ready = ray.wait(list(asked), num_returns=len(asked), timeout=_ANSWER_SECONDS)[0] if asked else []
    return {asked[reference]: ray.get(reference) for reference in ready}


def memory_to_ask(needed: int) -> int:
    """The bytes to ask Ray for, so that it places processes where they fit.

    Never more than a node has in Ray's account, which counts only what was free when it started: such a process would wait
    for ever, and whether it fits at all was decided before.

    Args:
        needed: bytes of a process.
    """
    most = max((node["Resources"].get("memory", 0.0) for node in ray.nodes() if node["Alive"]), default=0.0)
    return int(min(needed, most))
