"""A sweep's trials over two settings, as the table that a heat map shows."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import pandas as pd

from moe_ray.studies.search_space import SearchSpace

_MOST_VALUES = 8
_PREFERRED = ("identify.threshold", "identify.top_k")

Table = pd.DataFrame


def heat_map_axes(space: SearchSpace) -> tuple[str, str]:
    """The settings on the horizontal and the vertical axis: threshold and top_k where both are searched, else the first two.

    With one setting both are that one.
    """
    keys = space.settings
    chosen = [key for key in _PREFERRED if key in keys] + [key for key in keys if key not in _PREFERRED]
    return chosen[0], chosen[min(1, len(chosen) - 1)]


def heat_map_table(trials: pd.DataFrame, x: str, y: str, *, value: str = "objective") -> Table:
    """The best value of the trials of each cell; NaN where there is none.

    Args:
        trials: rows with the settings `x` and `y`, and `value`.
        x: becomes the columns; a setting with more than 8 values is cut into ranges that hold as many trials each.
        y: becomes the rows, the largest first.
        value: column to show.
    """
    labels = pd.DataFrame({"x": _labels(trials[x]), "y": _labels(trials[y]), "value": trials[value].astype(float)})
    table = labels.groupby(["y", "x"], observed=False)["value"].max().unstack("x")
    return table.iloc[::-1]


def bounded_heat_map(trials: pd.DataFrame, x: str, y: str) -> tuple[Table, Table]:
    """The table of objectives, and where no trial of a cell stayed within the bound on forgetting.

    A cell shows the best trial that stayed within it, and the best of the others where none did.

    Args:
        trials: rows with the settings `x` and `y`, `objective` and `is_within_bound`.
        x: becomes the columns.
        y: becomes the rows.

    Returns:
        two tables of one shape: numbers, and bool.
    """
    is_within = trials["is_within_bound"].astype(bool)
    every = heat_map_table(trials, x, y)
    within = heat_map_table(trials.assign(objective=trials["objective"].where(is_within)), x, y)
    return within.where(within.notna(), every), within.isna() & every.notna()


def _labels(values: pd.Series) -> pd.Series:
    """The values as ordered categories; many numbers become ranges that hold as many trials each."""
    is_number = pd.api.types.is_numeric_dtype(values)
    if not is_number:
        return values.astype(str).astype("category")
    if values.nunique() > _MOST_VALUES:
        cut = pd.qcut(values, _MOST_VALUES - 2, duplicates="drop")
        names = [f"{part.left:.3g} – {part.right:.3g}" for part in cut.cat.categories]
        return cut.cat.rename_categories(names)
    ordered = sorted(values.dropna().unique())
    return pd.Series(pd.Categorical(values, categories=ordered, ordered=True), index=values.index)


@dataclass(frozen=True, kw_only=True)
class HeatMap:
    """What a heat map shows.

    Attributes:
        table: values to print and to shade.
        over: True for cells whose value gets a star; of the table's shape.
        x: name of the horizontal axis.
        y: name of the vertical axis.
        marked: (column, row) labels of the cell to draw a frame around; None = no frame.
    """

    table: Table
    over: Table
    x: str
    y: str
    marked: tuple[Any, Any] | None


def map_of_trials(trials: pd.DataFrame, space: SearchSpace, winner: Mapping[str, Any]) -> HeatMap:
    """The finished trials over the space's two axes, with the winner's cell marked.

    Args:
        trials: rows with the settings of the space, `state`, `objective` and `is_within_bound`.
        space: what was searched.
        winner: the settings of the best trial.
    """
    x, y = heat_map_axes(space)
    finished = trials[trials["state"] == "finished"]
    table, over = bounded_heat_map(finished, x, y)
    # As text, as are the labels of settings that are no numbers.
    is_winner = (finished[[x, y]].astype(str) == [str(winner[x]), str(winner[y])]).all(axis=1)
    # Through the labels, because a setting of many values is shown in ranges, one of which holds the winner's.
    cells = list(zip(_labels(finished[x])[is_winner], _labels(finished[y])[is_winner], strict=True))
    return HeatMap(table=table, over=over, x=x, y=y, marked=cells[0] if cells else None)
