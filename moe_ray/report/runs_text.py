"""Finished runs beside one another, as table rows."""

from __future__ import annotations

from collections.abc import Sequence

import pandas as pd

from moe_ray.report.format import MISSING, decimal, difference, loss, rate, setting
from moe_ray.report.printable import printable
from moe_ray.studies.run_comparison import ComparedRun


def figures_of_runs(compared: Sequence[ComparedRun]) -> pd.DataFrame:
    """A row of text per run: its figures, and its differences from the first run on the same examples."""
    rows = []
    for run in compared:
        minus = run.minus_first or {}
        rows.append(
            {
                "run": f"{printable(run.name)} ({run.when} repair)",
                "unsafe refused": rate(run.figures["unsafe_refusal_rate"]).with_n(),
                "minus first": str(difference(minus.get("unsafe_refusal_rate"), "points")),
                "safe refused": rate(run.figures["safe_refusal_rate"]).with_n(),
                "minus first ": str(difference(minus.get("safe_refusal_rate"), "points")),
                "target loss": str(loss(run.figures["target_loss"])),
                "minus first  ": str(difference(minus.get("target_loss"), "nats/token")),
                "unsafe experts": str(run.num_union),
                "Jaccard": decimal(run.jaccard, 2),
            }
        )
    return pd.DataFrame(rows)


def settings_of_runs(compared: Sequence[ComparedRun], first: dict[str, object]) -> pd.DataFrame:
    """A row per setting that any run has otherwise than the first, a column per run.

    Args:
        compared: from `compare_runs`.
        first: all settings of the first run.
    """
    keys = sorted({key for run in compared for key in run.set_otherwise})
    columns: dict[str, list[str]] = {"setting": keys}
    for run in compared:
        columns[printable(run.name)] = [
            printable(setting(run.set_otherwise.get(key, first[key]))) or MISSING for key in keys
        ]
    return pd.DataFrame(columns)


def what_is_compared(compared: Sequence[ComparedRun]) -> list[str]:
    """Sentences on what the differences are about."""
    sentences = [
        "Brackets are 95% intervals. Differences are paired by example and are about the held-out prompts that both runs "
        "have; forms of one request count once. Jaccard: of the experts that are unsafe in any batch."
    ]
    sentences += [
        f"{printable(run.name)}: {run.num_shared} held-out prompts in common with the first, {run.num_other} that only one "
        "of the two has."
        for run in compared[1:]
        if run.num_other
    ]
    return sentences
