"""A heat map of trials over two settings, readable in grey: darker is better, and every cell has its value."""

from __future__ import annotations

import io
from typing import Any

import numpy as np
import pandas as pd

from moe_ray.search_space import SearchSpace

_MOST_VALUES = 8
_PREFERRED = ("selection.threshold", "selection.top_k")
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


def draw_heat_map(
    table: Table, *, x: str, y: str, title: str, marked: tuple[Any, Any] | None = None, over: Table | None = None
) -> dict[str, bytes]:
    """The table as `png` and `svg`.

    Args:
        table: from `heat_map_table`.
        x: name of the horizontal axis.
        y: name of the vertical axis.
        title: what the values are.
        marked: (column, row) of a cell to draw a frame around.
        over: True for cells whose value gets a star.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.patches import Rectangle

    values = table.to_numpy(dtype=float)
    rows, columns = values.shape
    figure = Figure(figsize=(max(4.5, 1.6 + 1.1 * columns), max(2.6, 1.5 + 0.6 * rows)), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    low, high = np.nanmin(values), np.nanmax(values)
    spread = high - low or 1.0
    axes.imshow(values, cmap="Greys", vmin=low - 0.3 * spread, vmax=high + 0.6 * spread, aspect="auto")
    for row in range(rows):
        for column in range(columns):
            number = values[row, column]
            star = "*" if over is not None and over.iloc[row, column] else ""
            text = "–" if np.isnan(number) else f"{number:.3f}{star}"
            is_dark = not np.isnan(number) and (number - low) / spread > 0.8
            axes.text(column, row, text, ha="center", va="center", color="white" if is_dark else "black")
    axes.set_xticks(range(columns), [_tick(name) for name in table.columns])
    axes.set_yticks(range(rows), [_tick(name) for name in table.index])
    axes.set_xlabel(x)
    axes.set_ylabel(y)
    axes.set_title(title, fontsize=10)
    if marked is not None and marked[0] in table.columns and marked[1] in table.index:
        corner = (list(table.columns).index(marked[0]) - 0.5, list(table.index).index(marked[1]) - 0.5)
        axes.add_patch(Rectangle(corner, 1, 1, fill=False, edgecolor="black", linewidth=3))
    return {kind: _saved(figure, kind) for kind in ("png", "svg")}


def _tick(value: Any) -> str:
    return f"{value:g}" if isinstance(value, (int, float, np.number)) else str(value)


def _saved(figure: Any, kind: str) -> bytes:
    data = io.BytesIO()
    # A date in the file would make equal pictures differ.
    figure.savefig(data, format=kind, dpi=150, metadata={"Date": None} if kind == "svg" else None)
    return data.getvalue()
