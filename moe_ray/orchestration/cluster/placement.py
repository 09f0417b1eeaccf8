"""On which nodes processes that hold a model may be: by labels of the nodes, and by the kind of their GPUs.

A kind of GPU is asked for as the resource that Ray itself gives nodes with one (`accelerator_type:A100`), which actors,
Ray Train and Ray Tune all know; labels are a scheduling rule of their own, which Ray Tune does not have.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import ray
from ray.util.placement_group import PlacementGroup, placement_group

from moe_ray.config.cluster import ClusterConfig
from moe_ray.errors import InputError
from moe_ray.orchestration.cluster.cluster_nodes import memory_to_ask
from moe_ray.orchestration.cluster.ray_session import is_local

_SHARE = 0.001
"""Of the resource, of which a node has 1: it says what kind a node is, and is not to run out."""


@dataclass(frozen=True, kw_only=True)
class Placement:
    """Where processes may be; anywhere by default.

    Attributes:
        node_labels: that a node must have; of every process.
        accelerator_type: of the GPUs; of processes that have some.
    """

    node_labels: Mapping[str, str] = field(default_factory=dict)
    accelerator_type: str = ""

    @classmethod
    def of(cls, config: ClusterConfig) -> Placement:
        """As the settings say."""
        return cls(node_labels=dict(config.node_labels), accelerator_type=config.accelerator_type)

    def resources(self, gpus: float) -> dict[str, float]:
        """What a process with so many GPUs asks for beside them."""
        return {f"accelerator_type:{self.accelerator_type}": _SHARE} if self.accelerator_type and gpus else {}

    def labels(self) -> dict[str, str] | None:
        """Ray's selector of labels; None = any node."""
        return dict(self.node_labels) or None

    def actor_options(self, gpus: float) -> dict[str, Any]:
        """Arguments of `ray.remote` for an actor with so many GPUs."""
        return {"resources": self.resources(gpus), "label_selector": self.labels()}

    def bundles(self, number: int, gpus: float, memory: int) -> PlacementGroup:
        """Places for so many processes that work together, given all at once or not at all; does not wait for them.

        Those with GPUs are on as few nodes as have room, since they send each other weights for every pass.

        Args:
            number: of the processes.
            gpus: of each.
            memory: bytes that each is to have of a node; 0 = nothing is asked for.
        """
        takes = {"CPU": 1.0, "GPU": gpus, "memory": float(memory), **self.resources(gpus)}
        asked = {name: amount for name, amount in takes.items() if amount}
        labels = self.labels()
        return placement_group(
            [dict(asked) for _ in range(number)],
            strategy="PACK" if gpus else "SPREAD",
            bundle_label_selector=None if labels is None else [labels] * number,
        )

    def require(self, gpus: float, what: str) -> None:
        """Refuses work that would wait for such a node for ever.

        Raises:
            InputError: no node of a cluster that cannot grow is one.
        """
        if not is_local():
            return
        nodes = [node for node in ray.nodes() if node["Alive"]]
        for name in self.resources(gpus):
            if not any(node["Resources"].get(name) for node in nodes):
                kinds = sorted({key.partition(":")[2] for node in nodes for key in node["Resources"] if _is_kind(key)})
                raise InputError(
                    f"{what}: cluster.accelerator_type={self.accelerator_type}: no node has such GPUs, got "
                    f"{', '.join(kinds) or 'none'}; set cluster.accelerator_type to one of them, or to nothing"
                )
        if self.node_labels and not any(self.fits(node) for node in nodes):
            raise InputError(
                f"{what}: cluster.node_labels={dict(self.node_labels)}: no node has these labels, got "
                f"{[_own_labels(node) for node in nodes]}; start a node with them (ray start --labels), or set "
                "cluster.node_labels to {}"
            )

    def fits(self, node: Mapping[str, Any]) -> bool:
        """Whether a node, as `ray.nodes()` describes it, has the labels."""
        labels = node.get("Labels", {})
        return all(_matches(wanted, labels.get(key)) for key, wanted in self.node_labels.items())

    def has_gpus(self, node: Mapping[str, Any]) -> bool:
        """Whether a node's GPUs, if it has some, are of the kind."""
        return not self.accelerator_type or f"accelerator_type:{self.accelerator_type}" in node["Resources"]


ANYWHERE = Placement()


def resources_of_process(gpus: float, memory: int, placement: Placement) -> dict[str, float]:
    """What a process that holds a model asks for beside CPUs, as Ray Train and Ray Tune take it.

    Args:
        gpus: that it has; its weights are then not in the node's memory.
        memory: bytes that it takes without any; 0 = nothing is asked for.
        placement: on which nodes.
    """
    if gpus:
        return {"GPU": gpus, **placement.resources(gpus)}
    asked = memory_to_ask(memory)
    return {"memory": float(asked)} if asked else {}


def _matches(wanted: str, label: str | None) -> bool:
    """Whether a node's label is one that Ray's selector takes: a value, `in(a,b)`, and either with `!` before it."""
    text = wanted.removeprefix("!")
    values = text[3:-1].split(",") if text.startswith("in(") and text.endswith(")") else [text]
    return (label in [value.strip() for value in values]) != wanted.startswith("!")


def _is_kind(resource: str) -> bool:
    return resource.startswith("accelerator_type:")


def _own_labels(node: Mapping[str, Any]) -> dict[str, str]:
    return {key: value for key, value in node.get("Labels", {}).items() if not key.startswith("ray.io/node-id")}
