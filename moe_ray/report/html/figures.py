"""The figures of a run.

They are read in grey as in colour: magnitudes run from dark to light (cividis), series differ in marker, line or hatch too.

Shape suffixes: B batches, L MoE layers, E experts.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from moe_ray.evaluation.verdict_rates import COST
from moe_ray.report.before_after import BeforeAfter
from moe_ray.report.format import has_interval, is_measured
from moe_ray.report.html.svg import draw, label
from moe_ray.studies.heat_map import heat_map_size, plot_heat_map
from moe_ray.studies.heat_map_table import HeatMap
from moe_ray.studies.pareto import BENEFIT, COST_IN_WORDS, cost_of, pareto_front

_DARK, _MIDDLE, _LIGHT, _ACCENT = "#17365c", "#7d9cc0", "#e2d289", "#8a6d00"
_MAP = "cividis"
_MARKERS, _LINES = "osD^v<>P", ("-", "--", ":", "-.")
_MOST_IN_NARROW = 64
_MOST_TICKS, _MOST_POINTS, _MOST_EXPERTS, _MOST_CATEGORIES, _MOST_NUMBERED = 12, 2000, 24, 24, 10


def heat_map(
    name: str,
    title: str,
    grid_LE: npt.NDArray[np.float64],
    selected_LE: npt.NDArray[np.bool_],
    layers: Sequence[int],
    *,
    limit: float,
    is_small: bool = False,
) -> str:
    """Layer x expert risk differences; a dot marks the selected experts.

    Args:
        name: of the figure.
        title: for those who cannot see it.
        grid_LE: (L, E) differences of fractions.
        selected_LE: (L, E) experts to mark.
        layers: L decoder layer indices.
        limit: the scale runs from minus this to this.
        is_small: one of many, without a scale of its own.
    """
    num_layers, num_experts = grid_LE.shape
    # Many experts take the page's whole width, or half of it; `wide_maps` tells the page.
    is_wide = wide_maps(num_experts)
    width = (5.4 if is_wide else 3.0) if is_small else (10.8 if is_wide else 5.4)
    body = width - (0.7 if is_small else 1.5)
    height = float(np.clip(body * num_layers / num_experts, 0.9 if is_small else 1.6, 2.4 if is_small else 5.0)) + 0.7

    def plot(figure: Figure) -> None:
        axes = figure.add_subplot()
        image = axes.imshow(grid_LE, cmap=_MAP, vmin=-limit, vmax=limit, aspect="auto", interpolation="none")
        rows, columns = np.nonzero(selected_LE)
        # In points, 72 to the inch: a dot takes up to 45% of a cell, and stays visible in a small one.
        cell = 72 * min(body / num_experts, (height - 0.7) / num_layers)
        size = float(np.clip(0.45 * cell, 1.8, 6.0))
        axes.plot(columns, rows, "o", markersize=size, markerfacecolor="white", markeredgecolor="black", mew=size / 6)
        _ticks(axes, "x", range(num_experts), "expert")
        # A label needs about a sixth of an inch.
        _ticks(axes, "y", layers, "layer", most=min(_MOST_TICKS, max(2, int((height - 0.7) * 5))))
        if not is_small:
            bar = figure.colorbar(image, ax=axes, shrink=0.9)
            bar.set_label("risk difference")

    return draw(name, title, plot, width=width, height=height)


def wide_maps(num_experts: int) -> bool:
    """Whether maps of so many experts take twice the width of others, so that a cell can be seen and pointed at."""
    return num_experts > _MOST_IN_NARROW


def _ticks(axes: Axes, side: str, names: Sequence[Any], what: str, *, most: int = _MOST_TICKS) -> None:
    # A power of two, as the numbers of experts are, and rounded up, so that there are never more ticks.
    step = 1 << (-(-len(names) // most) - 1).bit_length()
    positions = range(0, len(names), step)
    axis = axes.xaxis if side == "x" else axes.yaxis
    axis.set_ticks(list(positions), [str(names[position]) for position in positions])
    axis.set_label_text(what)


def overlap(name: str, title: str, table: pd.DataFrame, order: Sequence[int]) -> str:
    """Jaccard index of every two batches' masks.

    Args:
        name: of the figure.
        title: for those who cannot see it.
        table: from `batch_overlap`.
        order: `batch_idx` in the order to show.
    """
    positions = {batch: position for position, batch in enumerate(order)}
    jaccard_BB = np.eye(len(order))  # a batch with itself
    first, second = (table[side].map(positions).to_numpy() for side in ("batch_a", "batch_b"))
    jaccard_BB[first, second] = jaccard_BB[second, first] = table["jaccard"].fillna(0.0)

    def plot(figure: Figure) -> None:
        axes = figure.add_subplot()
        image = axes.imshow(jaccard_BB, cmap=_MAP, vmin=0, vmax=1, interpolation="none")
        if len(order) <= _MOST_NUMBERED:
            for (row, column), value in np.ndenumerate(jaccard_BB):
                ink = "black" if value > 0.5 else "white"
                axes.text(column, row, f"{value:.2f}", ha="center", va="center", color=ink, fontsize=8)
        _ticks(axes, "x", order, "batch_idx")
        _ticks(axes, "y", order, "batch_idx")
        figure.colorbar(image, ax=axes, shrink=0.8).set_label("Jaccard index")

    return draw(name, title, plot, height=4.2)


def trials(name: str, title: str, shown: HeatMap) -> str:
    """The objective of a sweep's trials over two settings."""

    def plot(figure: Figure) -> None:
        plot_heat_map(figure, shown)

    width, height = heat_map_size(shown)
    return draw(name, title, plot, width=width, height=height)


def refusal_against_cost(name: str, title: str, trials: pd.DataFrame) -> str:
    """Every finished trial by what it refuses and what that costs; the front is a line, the winner a star.

    Args:
        name: of the figure.
        title: for those who cannot see it.
        trials: ranked, with `state` and the columns of `pareto_front`.
    """
    finished = trials[trials["state"] == "finished"]
    finished = finished.assign(**{COST: cost_of(finished)})
    front = finished[pareto_front(finished)].sort_values([COST, BENEFIT])

    def plot(figure: Figure) -> None:
        axes = figure.add_subplot()
        axes.plot(100 * finished[COST], 100 * finished[BENEFIT], "o", color=_MIDDLE, label="trials")
        axes.plot(100 * front[COST], 100 * front[BENEFIT], "s-", color=_DARK, label="Pareto front", mfc="none", ms=9)
        axes.plot(
            100 * finished[COST].iloc[:1], 100 * finished[BENEFIT].iloc[:1], "*", color=_ACCENT, ms=13, label="winner"
        )
        axes.set_xlabel(f"{COST_IN_WORDS} (%)")
        axes.set_ylabel("unsafe prompts refused (%)")
        axes.legend(frameon=False)

    return draw(name, title, plot)


def experts_by_category(name: str, title: str, by_category: pd.DataFrame) -> str:
    """Share of each category's batches in which an expert is unsafe; the experts of most categories.

    Args:
        name: of the figure.
        title: for those who cannot see it.
        by_category: from `expert_categories`.
    """
    shares = by_category.pivot_table(index="category", columns="name", values="share", fill_value=0.0)
    top = shares.sum().sort_values(ascending=False, kind="stable").index[:_MOST_EXPERTS]
    shares = shares.loc[shares.index[:_MOST_CATEGORIES], sorted(top)]

    def plot(figure: Figure) -> None:
        axes = figure.add_subplot()
        image = axes.imshow(shares, cmap=_MAP, vmin=0, vmax=1, aspect="auto", interpolation="none")
        axes.set_xticks(range(len(shares.columns)), shares.columns, rotation=90, fontsize=8.5)
        axes.set_yticks(range(len(shares)), [label(str(category)) for category in shares.index])
        figure.colorbar(image, ax=axes).set_label("share of batches")

    # Each name on its side needs its line's height beside the next one.
    width = max(5.4, 3.4 + 0.19 * len(shares.columns))
    return draw(name, title, plot, width=width, height=1.6 + 0.24 * len(shares))


def union_growth(name: str, title: str, table: pd.DataFrame, setting: str, threshold: float) -> str:
    """Experts in the union over threshold, a line for each top_k.

    Args:
        name: of the figure.
        title: for those who cannot see it.
        table: from `sweep_union`.
        setting: that the threshold is.
        threshold: of the run, marked by a vertical line.
    """

    def plot(figure: Figure) -> None:
        axes = figure.add_subplot()
        for number, (top_k, line) in enumerate(table.groupby("top_k")):
            shade = 0.75 * number / max(1, table["top_k"].nunique() - 1)
            axes.plot(
                line["threshold"],
                line["union"],
                color=(shade * 0.9, shade * 0.85, 0.4),
                marker=_MARKERS[number % len(_MARKERS)],
                linestyle=_LINES[number % len(_LINES)],
                ms=4,
                label=f"top_k {top_k}",
            )
        axes.axvline(threshold, color="black", linewidth=0.8, linestyle=(0, (1, 3)), label="this run")
        axes.set_xlabel(setting)
        axes.set_ylabel("experts in the union")
        axes.set_ylim(bottom=0)
        axes.legend(frameon=False, fontsize=8)

    return draw(name, title, plot)


def training_curves(name: str, title: str, history: pd.DataFrame) -> str:
    """Loss of every step and its mean over each epoch, validation loss, and gradient norm."""
    steps = history[:: -(-len(history) // _MOST_POINTS)]
    epochs = history.groupby("epoch").agg(step=("step", "mean"), loss=("loss", "mean"))
    watched = history[history["validation_loss"].notna()]

    def plot(figure: Figure) -> None:
        above, below = figure.subplots(2, 1, sharex=True, height_ratios=(3, 2))
        above.plot(steps["step"], steps["loss"], ".", color=_ACCENT, ms=4, alpha=0.6, label="step")
        above.plot(epochs["step"], epochs["loss"], "-o", color=_DARK, ms=5, label="mean of the epoch")
        if len(watched):
            above.plot(watched["step"], watched["validation_loss"], "--D", color="black", ms=5, label="validation")
        above.set_ylabel("loss (nats/token)")
        above.set_ylim(bottom=0)
        above.legend(frameon=False, fontsize=8)
        below.plot(steps["step"], steps["grad_norm"], ".", color=_DARK, ms=4)
        below.set_ylabel("gradient norm")
        below.set_xlabel("step")
        below.set_ylim(bottom=0)

    return draw(name, title, plot, height=4.4)


def before_after(name: str, title: str, rows: Sequence[BeforeAfter], *, what: str) -> str:
    """Two bars with 95% intervals for every row.

    Args:
        name: of the figure.
        title: for those who cannot see it.
        rows: with rates; the first 24 are drawn.
        what: the rates' name, for the axis.
    """
    shown = [row for row in rows if is_measured(row.before) or is_measured(row.after)][:_MOST_CATEGORIES]

    def plot(figure: Figure) -> None:
        axes = figure.add_subplot()
        for when, shift, colour, hatch in (("before", -0.19, _LIGHT, "////"), ("after", 0.19, _MIDDLE, "")):
            bars = [(index + shift, getattr(row, when)) for index, row in enumerate(shown)]
            bars = [(position, rate) for position, rate in bars if has_interval(rate)]
            positions, rates = [position for position, _ in bars], [rate for _, rate in bars]
            values = np.array([rate["value"] for rate in rates])
            axes.barh(positions, values, height=0.36, color=colour, hatch=hatch, edgecolor="black", lw=0.6, label=when)
            # Whiskers reach from the value to the ends of its interval, which rounding may put beyond it by a hair.
            reach = [[rate["value"] - rate["low"] for rate in rates], [rate["high"] - rate["value"] for rate in rates]]
            axes.errorbar(
                values, positions, xerr=np.abs(reach), fmt="o", color="black", ms=2.5, elinewidth=1, capsize=2.5
            )
        axes.set_yticks(range(len(shown)), [f"{label(row.name, lines=2)} (n = {row.n})" for row in shown])
        axes.invert_yaxis()
        axes.set_xlim(0, 1)
        axes.xaxis.set_major_formatter(lambda value, _: f"{value:.0%}")
        axes.set_xlabel(what)
        figure.legend(loc="outside upper right", ncols=2, frameon=False, fontsize=9)

    return draw(name, title, plot, height=1.3 + 0.38 * len(shown))
