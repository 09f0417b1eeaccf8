"""The page's part on attacks: a table and words."""

from __future__ import annotations

from typing import Any

from moe_ray.report.attack_text import attack_rows, describe_attacks
from moe_ray.run_directory import RunDirectory


def attacks_part(run: RunDirectory) -> dict[str, Any] | None:
    """A row per attack and what they say; None where the model was not attacked."""
    if run.attacks is None:
        return None
    table = attack_rows(run.attacks)
    return {
        "lines": describe_attacks(run.attacks).splitlines(),
        "heads": list(table.columns),
        "rows": table.to_numpy().tolist(),
    }
