"""What a run found, drawn on matplotlib axes: for notebooks, and figures of one's own.

matplotlib is imported only when something is drawn; it comes with `moe-ray[plots]`.

Shape suffixes: L MoE layers, E experts.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import numpy.typing as npt
import pandas as pd

from moe_ray.config.identify import IdentifyConfig
from moe_ray.errors import InputError
from moe_ray.experts import ExpertMasks
from moe_ray.identification.risk_tables import RiskParts, aggregate_risk, batch_table
from moe_ray.identification.selection import SCORE_COLUMN

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_MAP, _BEFORE, _AFTER, _LOSS = "cividis", "#e2d289", "#7d9cc0", "#17365c"
_RATES = {
    "unsafe_refusal_rate": "unsafe refused",
    "safe_refusal_rate": "safe refused",
    "unsafe_harmful_rate": "unsafe answered with harm",
}


class Found(Protocol):
    """What of a run directory is drawn."""

    @property
    def masks(self) -> ExpertMasks:
        """The masks of every batch."""

    @property
    def risk(self) -> RiskParts:
        """The risk table."""

    @property
    def identify_config(self) -> IdentifyConfig:
        """The settings of the selection."""

    @property
    def summary(self) -> dict[str, Any] | None:
        """The figures of the run."""

    @property
    def history(self) -> pd.DataFrame | None:
        """The steps of the training."""

    @property
    def ablation(self) -> dict[str, Any] | None:
        """What the causal check found."""


class RunPlots:
    """The figures of a run; each method draws on the axes given, or on new ones, and returns them."""

    def plot_risk_differences(self: Found, batch_idx: int | None = None, *, ax: Axes | None = None) -> Axes:
        """Risk difference by layer and expert, as the selection ranks by it; a dot marks unsafe experts.

        Args:
            batch_idx: of a batch; None = the mean over all, and the union of their experts.
            ax: to draw on; None = a new figure.

        Raises:
            InputError: the run has no such batch or no identification, or matplotlib is missing.
        """
        masks = self.masks
        if batch_idx is not None and batch_idx not in masks.batch_idx:
            raise InputError(f"batch_idx: got {batch_idx}, expected one of {list(masks.batch_idx)[:20]}")
        rows = aggregate_risk(self.risk) if batch_idx is None else batch_table(self.risk, batch_idx)
        column = SCORE_COLUMN[self.identify_config.weighting]
        grid = rows.set_index(["layer", "expert"])[column].unstack("expert").reindex(index=masks.layers)
        selected_LE = masks.union if batch_idx is None else masks[batch_idx]
        title = "mean of all batches" if batch_idx is None else f"batch {batch_idx}"
        return draw_differences(axes_or_new(ax), grid.to_numpy(dtype=float), selected_LE, masks.layers, title=title)

    def plot_masks(self: Found, *, ax: Axes | None = None) -> Axes:
        """In how many batches each expert is unsafe.

        Args:
            ax: to draw on; None = a new figure.

        Raises:
            InputError: the run has no identification, or matplotlib is missing.
        """
        masks = self.masks
        title = f"unsafe experts of {len(masks.batch_idx)} batches"
        return draw_masks(axes_or_new(ax), masks.masks_BLE.sum(axis=0), masks.layers, title=title)

    def plot_rates(self: Found, *, ax: Axes | None = None) -> Axes:
        """Refusals, and harm where the judge tells it, before and after the repair, with 95% intervals.

        Args:
            ax: to draw on; None = a new figure.

        Raises:
            InputError: nothing was evaluated, or matplotlib is missing.
        """
        blocks = {when: (self.summary or {}).get(when) or {} for when in ("before", "after")}
        rates = {
            name: {when: _measured(block.get(key)) for when, block in blocks.items()} for key, name in _RATES.items()
        }
        shown = {name: sides for name, sides in rates.items() if any(sides.values())}
        if not shown:
            raise InputError("the run evaluated nothing; finish it (moe-ray full), or its stage evaluate")
        return draw_rates(axes_or_new(ax), shown)

    def plot_training_loss(self: Found, *, ax: Axes | None = None) -> Axes:
        """Loss by step and epoch (nats per token), and the validation loss where there is one.

        Args:
            ax: to draw on; None = a new figure.

        Raises:
            InputError: nothing was trained, or matplotlib is missing.
        """
        if self.history is None:
            raise InputError("the run trained nothing; run its stage finetune (moe-ray finetune)")
        return draw_training(axes_or_new(ax), self.history)

    def plot_causal_lift(self: Found, *, ax: Axes | None = None) -> Axes:
        """How much more the selected experts carry than others (nats per token), with 95% intervals.

        Args:
            ax: to draw on; None = a new figure.

        Raises:
            InputError: there was no causal check, or matplotlib is missing.
        """
        if self.ablation is None:
            raise InputError("the run has no causal check; run its stage ablate (moe-ray ablate)")
        return draw_lift(axes_or_new(ax), self.ablation.get("table", ()))


def _measured(figure: Mapping[str, Any] | None) -> Mapping[str, Any] | None:
    """A rate with its interval, where there is one."""
    is_known = figure is not None and all(figure.get(key) is not None for key in ("value", "low", "high"))
    return figure if is_known else None


def axes_or_new(ax: Axes | None) -> Axes:
    """The axes given, or those of a new figure.

    Raises:
        InputError: matplotlib is not installed.
    """
    if ax is not None:
        return ax
    try:
        from matplotlib import pyplot
    except ImportError as error:
        raise InputError("drawing needs matplotlib; pip install 'moe-ray[plots]'") from error
    return pyplot.subplots(layout="constrained")[1]  # type: ignore[no-any-return]


def draw_differences(
    ax: Axes, grid_LE: npt.NDArray[np.float64], selected_LE: npt.NDArray[np.bool_], layers: Sequence[int], *, title: str
) -> Axes:
    """Differences by layer and expert; a dot marks selected experts.

    Args:
        ax: to draw on.
        grid_LE: (L, E) differences of fractions.
        selected_LE: (L, E) experts to mark.
        layers: L decoder layer indices.
        title: above it.
    """
    limit = float(np.nanmax(np.abs(grid_LE))) or 1.0
    image = ax.imshow(grid_LE, cmap=_MAP, vmin=-limit, vmax=limit, aspect="auto", interpolation="none")
    rows, columns = np.nonzero(selected_LE)
    ax.plot(columns, rows, "o", color="white", markeredgecolor="black", markersize=3, linestyle="none")
    _name_axes(ax, layers, title)
    ax.figure.colorbar(image, ax=ax, label="risk difference")
    return ax


def draw_masks(ax: Axes, batches_LE: npt.NDArray[np.int64], layers: Sequence[int], *, title: str) -> Axes:
    """In how many batches each expert is unsafe.

    Args:
        ax: to draw on.
        batches_LE: (L, E) numbers of batches.
        layers: L decoder layer indices.
        title: above it.
    """
    image = ax.imshow(batches_LE, cmap=_MAP, vmin=0, aspect="auto", interpolation="none")
    _name_axes(ax, layers, title)
    ax.figure.colorbar(image, ax=ax, label="batches")
    return ax


def _name_axes(ax: Axes, layers: Sequence[int], title: str) -> None:
    step = max(1, -(-len(layers) // 12))
    ax.set_yticks(range(0, len(layers), step), [str(layer) for layer in layers[::step]])
    ax.set(xlabel="expert", ylabel="layer", title=title)


def draw_rates(ax: Axes, rates: Mapping[str, Mapping[str, Mapping[str, Any] | None]]) -> Axes:
    """Rates before and after, with their 95% intervals.

    Args:
        ax: to draw on.
        rates: per name, per `before` and `after` the `value`, `low` and `high`; None = not measured.
    """
    for when, shift, colour in (("before", -0.19, _BEFORE), ("after", 0.19, _AFTER)):
        rows = [(place + shift, found) for place, sides in enumerate(rates.values()) if (found := sides[when])]
        places, values = [place for place, _ in rows], np.array([found["value"] for _, found in rows])
        reach = [
            [found["value"] - found["low"] for _, found in rows],
            [found["high"] - found["value"] for _, found in rows],
        ]
        ax.barh(places, values, height=0.36, color=colour, edgecolor="black", linewidth=0.6, label=when)
        # Rounding may put the end of an interval beyond its value by a hair.
        ax.errorbar(values, places, xerr=np.abs(reach), fmt="none", ecolor="black", capsize=3)
    ax.set_yticks(range(len(rates)), list(rates))
    ax.invert_yaxis()
    ax.set(xlim=(0, 1), xlabel="share of held-out prompts, with 95% intervals")
    ax.legend()
    return ax


def draw_training(ax: Axes, history: pd.DataFrame) -> Axes:
    """The loss of each step, and the validation loss where there is one.

    Args:
        ax: to draw on.
        history: with `step`, `loss` and `validation_loss`.
    """
    ax.plot(history["step"], history["loss"], ".", color=_AFTER, label="step")
    by_epoch = history.groupby("epoch").agg(step=("step", "mean"), loss=("loss", "mean"))
    ax.plot(by_epoch["step"], by_epoch["loss"], "-o", color=_LOSS, label="mean of the epoch")
    watched = history[history["validation_loss"].notna()]
    if len(watched):
        ax.plot(watched["step"], watched["validation_loss"], "--D", color="black", label="validation")
    ax.set(xlabel="step", ylabel="loss (nats/token)", ylim=(0, None))
    ax.legend()
    return ax


def draw_lift(ax: Axes, table: Sequence[Mapping[str, Any]]) -> Axes:
    """How much more the selected experts carry than each control, with 95% intervals.

    Args:
        ax: to draw on.
        table: of the causal check, with `set`, `lift`, `lift_low` and `lift_high`.

    Raises:
        InputError: it has no control.
    """
    rows = [row for row in table if isinstance(row.get("lift"), float | int) and np.isfinite(row["lift"])]
    if not rows:
        raise InputError("the causal check compared the selected experts with no others; raise ablate.draws")
    values = np.array([row["lift"] for row in rows])
    reach = np.abs([values - [row["lift_low"] for row in rows], [row["lift_high"] for row in rows] - values])
    ax.errorbar(values, range(len(rows)), xerr=reach, fmt="o", color=_LOSS, capsize=3)
    ax.axvline(0, color="black", linewidth=0.8, linestyle=":")
    ax.set_yticks(range(len(rows)), [str(row["set"]) for row in rows])
    ax.invert_yaxis()
    ax.set(xlabel="lift over these (nats/token), with 95% intervals")
    return ax
