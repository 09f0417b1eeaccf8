"""The page's part on the judge behind the rates: who it is, and how often it agrees with people."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pandas as pd

from moe_ray.report.judge_text import check_tables, judge_in_words


def judge_part(summary: Mapping[str, Any] | None) -> dict[str, Any]:
    """The words and the two tables; no words for a run from before this was kept, no tables where nothing was measured."""
    judged = (summary or {}).get("judge")
    check = (judged or {}).get("check")
    figures, confusion = (None, None) if check is None else map(_rows, check_tables(check))
    return {"words": judge_in_words(judged), "figures": figures, "confusion": confusion}


def _rows(table: pd.DataFrame) -> dict[str, Any]:
    return {"columns": list(table.columns), "rows": table.to_numpy().tolist()}
