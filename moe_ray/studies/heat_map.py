"""A heat map of trials over two settings, readable in grey: darker is better, and every cell has its value."""

from __future__ import annotations

import io
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from moe_ray.studies.search_space import SearchSpace

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

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
    """The values as ordered categories."""
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
        marked: (column, row) of the cell to draw a frame around.
    """

    table: Table
    over: Table
    x: str
    y: str
    marked: tuple[Any, Any]


def map_of_trials(trials: pd.DataFrame, space: SearchSpace, winner: Mapping[str, Any]) -> HeatMap:
    """The finished trials over the space's two axes, the winner's cell marked.

    Args:
        trials: rows with the settings of the space, `state`, `objective` and `is_within_bound`.
        space: what was searched.
        winner: the settings of the best trial.
    """
    x, y = heat_map_axes(space)
    table, over = bounded_heat_map(trials[trials["state"] == "finished"], x, y)
    column, row = (value if isinstance(value, (int, float)) else str(value) for value in (winner[x], winner[y]))
    return HeatMap(table=table, over=over, x=x, y=y, marked=(column, row))


def draw_heat_map(shown: HeatMap, *, title: str) -> dict[str, bytes]:
    """The heat map as `png` and `svg`.

    Args:
        shown: what is in it.
        title: what the values are.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    width, height = heat_map_size(shown)
    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    plot_heat_map(figure, shown).set_title(title, fontsize=10)
    return {kind: _saved(figure, kind) for kind in ("png", "svg")}


def heat_map_size(shown: HeatMap) -> tuple[float, float]:
    """Width and height (inches) in which every value can be read."""
    rows, columns = shown.table.shape
    return max(4.5, 1.6 + 1.1 * columns), max(2.6, 1.5 + 0.6 * rows)


def plot_heat_map(figure: Figure, shown: HeatMap) -> Axes:
    """Draws the heat map on an empty figure."""
    from matplotlib.patches import Rectangle

    table = shown.table
    values = table.to_numpy(dtype=float)
    rows, columns = values.shape
    axes = figure.add_subplot()
    low, high = np.nanmin(values), np.nanmax(values)
    spread = high - low or 1.0
    axes.imshow(values, cmap="Greys", vmin=low - 0.3 * spread, vmax=high + 0.6 * spread, aspect="auto")
    for row in range(rows):
        for column in range(columns):
            number = values[row, column]
            star = "*" if shown.over.iloc[row, column] else ""
            text = "–" if np.isnan(number) else f"{number:.3f}{star}"
            is_dark = not np.isnan(number) and (number - low) / spread > 0.8
            axes.text(column, row, text, ha="center", va="center", color="white" if is_dark else "black")
    axes.set_xticks(range(columns), [_tick(name) for name in table.columns])
    axes.set_yticks(range(rows), [_tick(name) for name in table.index])
    axes.set_xlabel(shown.x)
    axes.set_ylabel(shown.y)
    column, row = shown.marked
    if column in table.columns and row in table.index:
        corner = (list(table.columns).index(column) - 0.5, list(table.index).index(row) - 0.5)
        axes.add_patch(Rectangle(corner, 1, 1, fill=False, edgecolor="black", linewidth=3))
    return axes


def _tick(value: Any) -> str:
    return f"{value:g}" if isinstance(value, (int, float, np.number)) else str(value)


def _saved(figure: Figure, kind: str) -> bytes:
    data = io.BytesIO()
    # A date in the file would make equal pictures differ.
    figure.savefig(data, format=kind, dpi=150, metadata={"Date": None} if kind == "svg" else None)
    return data.getvalue()
