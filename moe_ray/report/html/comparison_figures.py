"""The figures of a comparison: refusals over the steps, and what transfers between categories.

Read in grey as in colour, as those of `figures`.
"""

from __future__ import annotations

from itertools import cycle

import pandas as pd
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from moe_ray.report.html.svg import draw, label
from moe_ray.studies.baselines import BASE, OURS
from moe_ray.studies.heat_map import heat_map_size, plot_heat_map
from moe_ray.studies.heat_map_table import HeatMap

_GREYS = ("#17365c", "#7d9cc0", "#8a6d00", "#555555", "#b5a04d", "#999999")
_MARKERS, _LINES = "osD^v<>PXd*", ("--", ":", "-.")
_MOST_CATEGORIES = 24


def curves(name: str, title: str, table: pd.DataFrame) -> str:
    """Refusals of unsafe prompts over the share of steps, a line per arm; per-batch masks are the thick one.

    Every line begins at the base model, which is share 0.

    Args:
        name: of the figure.
        title: for those who cannot see it.
        table: from `comparison_table`.
    """
    base = float(table.loc[table["arm"] == BASE, "unsafe_refusal_rate"].iloc[0])
    arms = [(arm, rows) for arm, rows in table.groupby("arm", sort=False) if arm != BASE]

    def plot(figure: Figure) -> None:
        axes = figure.add_subplot()
        looks = zip(cycle(_GREYS), cycle(_MARKERS), cycle(_LINES), strict=False)
        for (arm, rows), (colour, marker, line) in zip(arms, looks, strict=False):
            is_ours, rates = arm == OURS, rows["unsafe_refusal_rate"].tolist()
            # What trains nothing is at the beginning what it is at the end.
            first = base if (rows["steps"] > 0).any() else rates[0]
            axes.plot(
                [0.0, *rows["share"]],
                [first, *rates],
                color="black" if is_ours else colour,
                linestyle="-" if is_ours else line,
                linewidth=2.6 if is_ours else 1.1,
                marker=marker,
                ms=6 if is_ours else 4,
                zorder=3 if is_ours else 2,
                label=label(str(arm)),
            )
        axes.set_xlim(0, 1.02)
        axes.set_ylim(-0.02, 1.02)
        axes.xaxis.set_major_formatter(lambda value, _: f"{value:.0%}")
        axes.yaxis.set_major_formatter(lambda value, _: f"{value:.0%}")
        axes.set_xlabel("share of the steps")
        axes.set_ylabel("unsafe prompts refused")
        figure.legend(loc="outside right upper", frameon=False, fontsize=8)

    return draw(name, title, plot, width=7.2, height=max(3.6, 0.6 + 0.19 * len(arms)))


def transfer(name: str, title: str, matrix: pd.DataFrame) -> str:
    """A figure for each category that trained (row) and was tested (column); a frame marks a category with itself.

    Args:
        name: of the figure.
        title: for those who cannot see it.
        matrix: from `transfer_matrix`; the first 24 categories are drawn.
    """
    shown = matrix.iloc[:_MOST_CATEGORIES, :_MOST_CATEGORIES]
    own = [
        (list(shown.columns).index(category), row)
        for row, category in enumerate(shown.index)
        if category in shown.columns
    ]
    named = shown.set_axis([label(str(text)) for text in shown.index]).set_axis(
        [label(str(text)) for text in shown.columns], axis="columns"
    )
    heat_map = HeatMap(table=named, over=named.isna() & False, x="tested", y="trained", marked=None)

    def plot(figure: Figure) -> None:
        axes = plot_heat_map(figure, heat_map)
        axes.tick_params(axis="x", rotation=90)
        for column, row in own:
            axes.add_patch(Rectangle((column - 0.5, row - 0.5), 1, 1, fill=False, edgecolor="black", linewidth=1.5))

    width, height = heat_map_size(heat_map)
    return draw(name, title, plot, width=width, height=height)
