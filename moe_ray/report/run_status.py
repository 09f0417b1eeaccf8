"""How far a run is, from its folder alone: a row per stage."""

from __future__ import annotations

from typing import Any

import pandas as pd

from moe_ray.report.format import MISSING, decimal
from moe_ray.routing.count_keys import all_keys
from moe_ray.run_directory import CAPTURE, COUNTS, FINETUNE, STAGES, SUMMARY, RunDirectory
from moe_ray.storage.lock import holder
from moe_ray.storage.stage import STARTED


def run_status(run: RunDirectory) -> pd.DataFrame:
    """A row of text per stage that the run has finished or begun: `stage`, `state`, `seconds`, `finished`, `so far`."""
    rows = []
    for name in STAGES:
        manifest = run.manifest(name)
        if manifest is None and not run.holds(name, STARTED):
            continue
        state = "under way" if manifest is None and holder(run.folder) is not None else "not finished"
        rows.append(
            {
                "stage": name,
                "state": state if manifest is None else "finished",
                "seconds": MISSING if manifest is None else decimal(manifest["notes"].get("seconds"), 1),
                "finished": MISSING if manifest is None else str(manifest["environment"].get("finished") or MISSING),
                "so far": _so_far(run, name),
            }
        )
    return pd.DataFrame(rows, columns=["stage", "state", "seconds", "finished", "so far"])


def status_in_words(run: RunDirectory) -> str:
    """Who is at work on the run, or that nobody is, and what goes on with it."""
    who: Any = holder(run.folder)
    if who is not None:
        return f"Process {who['pid']} on {who['host']} is at work on it."
    if run.folder.exists(SUMMARY) and (run_status(run)["state"] == "finished").all():
        return "Nobody is at work on it, and all that was begun is finished."
    return "Nobody is at work on it; the command that began it goes on where it stopped."


def _so_far(run: RunDirectory, name: str) -> str:
    """Of stages that are long: how much of their work is there."""
    if name == CAPTURE and run.folder.fs.exists(run.folder.file(COUNTS)):
        parts = run.counts_folder
        names = [file for file in parts.names() if file.endswith(".parquet")]
        return f"{len(all_keys(parts, names)):,} examples counted"
    if name == FINETUNE and run.history is not None:
        last = run.history.iloc[-1]
        return f"step {int(last['step']) + 1:,}, epoch {int(last['epoch']) + 1}, loss {decimal(float(last['loss']))}"
    return MISSING
