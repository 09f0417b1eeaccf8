"""The page's part on harnesses: a table and words."""

from __future__ import annotations

from typing import Any

from moe_ray.report.harness_text import describe_harness, harness_rows
from moe_ray.run_directory import RunDirectory


def harness_part(run: RunDirectory) -> dict[str, Any] | None:
    """A row per task and metric; None where no task was run."""
    if run.harness is None:
        return None
    table = harness_rows(run.harness)
    return {
        "lines": describe_harness(run.harness).splitlines(),
        "heads": list(table.columns),
        "rows": table.to_numpy().tolist(),
    }
