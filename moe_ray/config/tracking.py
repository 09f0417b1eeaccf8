"""Settings of MLflow."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

from moe_ray.config.fields import setting
from moe_ray.config.section import Section


@dataclass(frozen=True, kw_only=True)
class TrackingConfig(Section):
    """Where the run is tracked (MLflow)."""

    group: ClassVar[str] = "tracking"

    uri: str = setting("", "MLflow tracking URI; empty = an SQLite file in the run directory", affects="presentation")
    experiment: str = setting("moe-ray", "name of the MLflow experiment", affects="presentation")
    register: str = setting(
        "",
        "name in MLflow's model registry for the repaired model, base and learned experts merged; empty = do not register",
        affects="presentation",
    )

    def faults(self) -> Iterator[str]:
        """Yields names that MLflow does not take."""
        if not self.experiment:
            yield self.wrong("experiment", "a name")
        if set(self.register) & set("/:"):
            yield self.wrong("register", "a name without / or :")
