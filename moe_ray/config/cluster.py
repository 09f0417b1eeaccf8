"""Settings of Ray."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

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
