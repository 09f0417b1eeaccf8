"""Settings of MLflow."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

from moe_ray.config.fields import setting
from moe_ray.config.section import Section

_ADDRESS = re.compile(r"(https?|(sqlite|postgresql|mysql|mssql)(\+\w+)?)://.|databricks(-uc)?\b|uc\b")
_PASSWORD = re.compile(r"[^/]*://[^/@]*:[^/@]+@")


@dataclass(frozen=True, kw_only=True)
class TrackingConfig(Section):
    """Where the run is tracked (MLflow)."""

    group: ClassVar[str] = "tracking"

    uri: str = setting(
        "",
        "MLflow tracking URI; empty = the SQLite file mlflow.db beside the run directory, which all runs there share",
        affects="presentation",
    )
    experiment: str = setting("moe-ray", "name of the MLflow experiment", affects="presentation")
    register: str = setting(
        "",
        "name in MLflow's model registry for the repaired model, base and learned experts merged; empty = do not register",
        affects="presentation",
    )

    system_metrics: bool = setting(
        False,
        "log processors, memory, disk, network and GPUs of the driver's machine every ten seconds",
        affects="presentation",
    )

    def faults(self) -> Iterator[str]:
        """Yields an address and names that MLflow does not take, and a password, which does not belong into a file."""
        if self.uri and not _ADDRESS.match(self.uri):
            yield self.wrong("uri", "an address such as http://HOST:5000 or sqlite:////PATH/mlflow.db, or nothing")
        elif _PASSWORD.match(self.uri):
            yield (
                "tracking.uri: holds a password, which would be written into configuration, report and logs; leave it out, "
                "and give it in the environment: MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD, or for a database "
                "as its own client takes it (PGPASSWORD, ~/.pgpass)"
            )
        if not self.experiment:
            yield self.wrong("experiment", "a name")
        if set(self.register) & set("/:"):
            yield self.wrong("register", "a name without / or :")
