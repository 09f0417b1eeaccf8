"""A heat map of trials over two settings, readable in grey: darker is better, and every cell has its value."""

from __future__ import annotations

import io
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from moe_ray.studies.heat_map_table import HeatMap


def draw_heat_map(shown: HeatMap, *, title: str) -> dict[str, bytes]:
    """The heat map as `png` and `svg`.

    Args:
        shown: what is in it.
        title: what the values are.
    """
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
    table = shown.table
    values = table.to_numpy(dtype=float)
    rows, columns = values.shape
    axes = figure.add_subplot()
    low, high = np.nanmin(values), np.nanmax(values)
    spread = high - low or 1.0
    # The scale reaches beyond the values on both sides: the lightest cell is not paper, the darkest not ink.
    axes.imshow(values, cmap="Greys", vmin=low - 0.3 * spread, vmax=high + 0.6 * spread, aspect="auto")
    for (row, column), number in np.ndenumerate(values):
        star = "*" if shown.over.iloc[row, column] else ""
        text = "–" if np.isnan(number) else f"{number:.3f}{star}"
        is_dark = not np.isnan(number) and (number - low) / spread > 0.8
        axes.text(column, row, text, ha="center", va="center", color="white" if is_dark else "black")
    axes.set_xticks(range(columns), [_tick(name) for name in table.columns])
    axes.set_yticks(range(rows), [_tick(name) for name in table.index])
    axes.set_xlabel(shown.x)
    axes.set_ylabel(shown.y)
    if shown.marked is not None:
        column, row = shown.marked
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
