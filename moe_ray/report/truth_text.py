"""How well the selection found what was planted, in words and as a table, for models of which that is known."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pandas as pd

from moe_ray.report.format import MISSING, decimal, rate
from moe_ray.report.printable import printable
from moe_ray.run_directory import RunDirectory


def truth_in_words(found: Mapping[str, Any] | None) -> list[str]:
    """One sentence or two, or none where nothing is known.

    Args:
        found: from `moe_ray.organisms.recovery`; None = the model has no truth file.
    """
    if found is None:
        return []
    selected, decoys = decimal(found["selected"], 1), decimal(found["decoys_selected"], 1)
    known = f"What carries the behaviour is known of this model ({printable(found['kind'])})"
    if found["recall"] is None:
        return [
            f"{known}: no expert does. The {selected} selected experts of a batch, {decoys} of them decoys, are routed more "
            "on unsafe prompts and are not the cause."
        ]
    precision = "nothing was selected" if found["precision"] is None else f"precision {rate(found['precision'])}"
    return [
        f"{known}: of the {decimal(found['planted'], 1)} planted experts of a category, the selection found "
        f"{rate(found['recall'])} (recall); of the {selected} experts selected per batch, {decimal(found['found'], 1)} are "
        f"planted ({precision}) and {decoys} are decoys, which are routed on the same prompts and carry nothing."
    ]


def truth_rows(found: Mapping[str, Any]) -> pd.DataFrame:
    """A row per category and one of all batches, as text.

    Args:
        found: from `moe_ray.organisms.recovery`.
    """
    blocks = {**found["per_category"], "all batches": found}
    rows = [
        [
            printable(name),
            str(block["batches"]),
            decimal(block["selected"], 1),
            decimal(block["found"], 1),
            decimal(block["decoys_selected"], 1),
            *(MISSING if block[key] is None else str(rate(block[key])) for key in ("precision", "recall")),
        ]
        for name, block in blocks.items()
    ]
    names = ["category", "batches", "selected", "planted among them", "decoys among them", "precision", "recall"]
    return pd.DataFrame(rows, columns=names)


def truth_part(run: RunDirectory) -> dict[str, Any] | None:
    """What the page says; None = nothing is known of the model."""
    found = (run.summary or {}).get("truth")
    if found is None:
        return None
    table = truth_rows(found)
    return {"words": truth_in_words(found)[0], "columns": list(table.columns), "rows": table.to_numpy().tolist()}
