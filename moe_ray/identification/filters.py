"""Filters of a selection, which only take experts away, and what is said where nothing is left."""

from __future__ import annotations

import pandas as pd

from moe_ray.config.identify import IdentifyConfig
from moe_ray.errors import InputError
from moe_ray.experts import Expert
from moe_ray.identification.comparisons import is_relative

_P_COLUMN = {"maxt": "p_maxt", "bh": "q", "none": "p"}
ROUNDING = 1e-12
"""A p of 0.05 or a share of 0.9 is a fraction that floats hold only nearly; equality within this counts as equality."""


def above_alpha(p: pd.Series, alpha: float) -> pd.Series:
    """Whether each p is above alpha; equality within rounding is not above."""
    return p > alpha + ROUNDING


def require_column(table: pd.DataFrame, column: str, setting: str) -> None:
    """Refuses a table without the column that a setting needs.

    Raises:
        InputError: it is not there.
    """
    if column not in table:
        raise InputError(
            f"{setting} needs the column {column!r}, which the risk table lacks; compute it with moe_ray.identification "
            "from counts that hold what it needs (routed weights for activation and esft_gate, scores for the rules that "
            "rank by one)"
        )


def filtered(chosen: tuple[Expert, ...], table: pd.DataFrame, config: IdentifyConfig) -> tuple[Expert, ...]:
    """The chosen experts that `identify.alpha` and `identify.stability` leave, in the same order."""
    if not (config.alpha or config.stability):
        return chosen
    dropped = pd.Series(False, index=table.index)
    if config.alpha:
        column = _P_COLUMN[config.correction]
        require_column(table, column, f"identify.alpha={config.alpha}")
        dropped |= above_alpha(table[column], config.alpha) | table[column].isna()
    if config.stability:
        require_column(table, "stability", f"identify.stability={config.stability}")
        dropped |= ~(table["stability"] >= config.stability - ROUNDING)
    left = table[~dropped]
    remaining = {Expert(int(layer), int(expert)) for layer, expert in zip(left["layer"], left["expert"], strict=True)}
    # Filtered after the top_k were chosen: an expert that is dropped is not replaced by the next weaker one, since that
    # would make a stricter filter select experts that a laxer one does not.
    return tuple(expert for expert in chosen if expert in remaining)


def nothing_selected(
    largest: float, smallest_p: float, config: IdentifyConfig, num_batches: int, *, column: str
) -> str:
    """Why no batch has any unsafe expert.

    Args:
        largest: the largest value in `column` of any expert and batch.
        smallest_p: the smallest corrected p.
        config: the configuration.
        num_batches: of the run.
        column: that the rule ranks by.
    """
    if is_relative(config) and not largest > 0:
        return (
            f"no expert of any of {num_batches} batches has {column} above 0; the largest is {largest:.3g}, so by "
            f"identify.rule={config.rule} no expert counts more on unsafe prompts; use another rule"
        )
    if not is_relative(config) and largest <= config.threshold:
        return (
            f"no expert of any of {num_batches} batches has {column} above {config.threshold}; the "
            f"largest is {largest:.4f}; lower identify.threshold"
        )
    return (
        f"no expert of any of {num_batches} batches passes identify.alpha={config.alpha} ({config.correction}) and "
        f"identify.stability={config.stability}; the smallest corrected p is {smallest_p:.3g}, so at this "
        "number of prompts no selected expert is significant; use more prompts a batch "
        "(prompts.safe_per_batch, prompts.unsafe_per_batch), or set identify.alpha=0 and identify.stability=0"
    )
