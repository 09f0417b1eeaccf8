"""Settings of Ray."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from moe_ray.config.auto import Auto
from moe_ray.config.fields import setting
from moe_ray.config.section import Section


@dataclass(frozen=True, kw_only=True)
class ClusterConfig(Section):
    """The Ray cluster that the run uses."""

    group: ClassVar[str] = "cluster"

    address: str = setting(
        "",
        "address of a running Ray cluster; empty = the environment variable RAY_ADDRESS if set, else Ray is started on "
        "this machine",
        affects="speed",
    )
    num_cpus: int | Auto = setting(  # noqa: RUF009
        "auto",
        "logical CPUs of a Ray started on this machine, which may exceed its cores; at least the sum of actors and workers, "
        "plus 2; auto = enough for the actors that are asked for and for one on each GPU, and at least 4",
        affects="speed",
        at_least=2,
    )
    node_labels: Mapping[str, Any] = setting(
        {},
        "labels that a node must have for a process that holds the model, such as {pool: inference} of nodes started with "
        "ray start --labels pool=inference, or {ray.io/market-type: on-demand}; a value may be a selector of Ray's, such as "
        "in(a,b) or !a. Trials of a sweep cannot be placed by labels",
        affects="speed",
    )
    accelerator_type: str = setting(
        "",
        "kind of GPU for processes that have one, as Ray names it, such as H100 or A100-80G; empty = any",
        affects="speed",
    )

    def faults(self) -> Iterator[str]:
        """Yields what is wrong with the labels."""
        if not all(isinstance(part, str) and part for pair in self.node_labels.items() for part in pair):
            yield self.wrong("node_labels", "names of labels, each with a text")
