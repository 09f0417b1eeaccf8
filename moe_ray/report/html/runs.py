"""The page that shows finished runs beside one another; it loads nothing and has no script."""

from __future__ import annotations

from collections.abc import Sequence

import pandas as pd

from moe_ray.report.html.templates import templates
from moe_ray.report.runs_text import figures_of_runs, settings_of_runs, what_is_compared
from moe_ray.studies.run_comparison import ComparedRun


def runs_page(compared: Sequence[ComparedRun], first_settings: dict[str, object]) -> str:
    """The page as HTML; every text of a run is escaped.

    Args:
        compared: from `compare_runs`.
        first_settings: all settings of the first run.
    """
    page: str = (
        templates()
        .get_template("runs.html.jinja")
        .render(
            names=[run.name for run in compared],
            sentences=what_is_compared(compared),
            tables={
                "Held-out figures": _cells(figures_of_runs(compared)),
                "Settings that differ": _cells(settings_of_runs(compared, first_settings)),
            },
        )
    )
    return page


def _cells(table: pd.DataFrame) -> dict[str, list[list[str]] | list[str]]:
    return {"columns": [str(name) for name in table.columns], "rows": table.astype(str).to_numpy().tolist()}
