"""How many processes that hold a model, or a part of one, have room on the machines."""

from __future__ import annotations

import math
from collections.abc import Sequence

from moe_ray.resources.model_size import ModelSize
from moe_ray.resources.nodes import GB, Node

RESERVED = 2 * GB
"""Bytes of a node that weights do not get: Ray, the driver, tracking and the libraries of the processes."""

_GPU_RESERVED = 2 * GB
"""Bytes of a GPU that weights do not get: CUDA's own, and activations."""

ROOM = 1.05
"""Weights with the buffers beside them."""


def gpus_for(needed: int, gpu_memory: int | None) -> int:
    """How many GPUs hold so many bytes of weights and what is computed with them; 1 where their memory is not known."""
    if gpu_memory is None:
        return 1
    usable = gpu_memory - _GPU_RESERVED
    return max(1, math.ceil(needed / usable)) if usable > 0 else 1


def copies_on(node: Node, gpus: float) -> int:
    """How many processes with so many GPUs each a node has room for; a fraction shares a GPU, and never spans two."""
    by_gpu = math.floor(1 / gpus + 1e-9) * node.gpus if gpus < 1 else math.floor(node.gpus / gpus + 1e-9)
    return min(by_gpu, int(node.cpus))


def gpus_per_copy(model: ModelSize, nodes: Sequence[Node], shards: int) -> int:
    """The fewest GPUs of one node that hold the weights in the checkpoint's own type; 0 = none do.

    Where they are sharded, one for each part, on any nodes.

    Args:
        model: which one.
        nodes: the machines.
        shards: over how many processes a copy is spread.
    """
    if shards > 1:
        part = math.ceil(model.bytes_in(model.own_dtype) * ROOM / shards)
        fitting = sum(copies_on(node, 1) for node in nodes if node.gpus and gpus_for(part, node.gpu_memory) == 1)
        return shards if fitting >= shards else 0
    needed = math.ceil(model.bytes_in(model.own_dtype) * ROOM)
    wanted = [(gpus_for(needed, node.gpu_memory), node.gpus) for node in nodes if node.gpus]
    return min((per_copy for per_copy, gpus in wanted if per_copy <= gpus), default=0)


def places_on_cpus(nodes: Sequence[Node], needed: float, shards: int) -> int:
    """How many copies of the model have room on CPUs, a process of each shard taking so many bytes.

    A process computes with all cores of its node, so no node has two of a model that is whole in each, and there are no more
    groups, each of which has one that computes, than nodes.

    Args:
        nodes: the machines.
        needed: bytes of a process.
        shards: over how many processes a copy is spread.
    """
    if shards == 1:
        return sum(node.cpus >= 1 and node.memory >= needed + RESERVED for node in nodes)
    parts = [max(0, int((node.memory - RESERVED) // needed)) for node in nodes if node.cpus >= 1]
    return min(sum(parts) // shards, sum(number > 0 for number in parts))


def copies(nodes: Sequence[Node], gpus: float, needed: int, shards: int) -> int:
    """How many copies of the model have room; at least 1.

    Args:
        nodes: the machines.
        gpus: of a process; 0 = on CPUs.
        needed: bytes of a process on CPUs.
        shards: over how many processes a copy is spread.
    """
    if gpus:
        return max(1, sum(copies_on(node, gpus) for node in nodes if node.gpus) // shards)
    return max(1, places_on_cpus(nodes, needed, shards))
