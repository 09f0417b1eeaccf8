"""Per-batch masks compared with baselines: one row per arm, with paired differences."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pandas as pd

from moe_ray.evaluation.metrics import paired_changes, summarise
from moe_ray.studies.baselines import OURS
from moe_ray.studies.measured import Measured

BASE = "base"
"""The arm that trains nothing."""

_ENDINGS = {"value": "", "low": "_low", "high": "_high", "n": "_n"}


@dataclass(frozen=True, kw_only=True)
class ArmResult:
    """What an arm gave on the held-out examples.

    Attributes:
        name: of the arm.
        measured: answers under natural routing, and losses on neutral text.
        experts_per_batch: mean over trained batches; None = no mask.
        trainable_parameters: numbers that were allowed to change.
        train_seconds: of fine-tuning alone.
    """

    name: str
    measured: Measured
    experts_per_batch: float | None
    trainable_parameters: int
    train_seconds: float


def comparison_table(results: Sequence[ArmResult]) -> pd.DataFrame:
    """One row per arm.

    Args:
        results: those of `BASE`, `OURS` and the baselines, all on the same examples.

    Returns:
        columns `arm, experts_per_batch, trainable_parameters, train_seconds`; for `unsafe_refusal_rate` and
        `safe_refusal_rate` the rate with `_low`, `_high`, `_n` and, as `ours_minus_<rate>` with the same endings, the paired
        difference of per-batch masks to the arm; for `safe_target_loss` and `neutral_loss` the rise above the base model
        with the same endings: what was forgotten (nats per token; NaN where it was not measured);
        `ours_minus_neutral_loss`, how much more per-batch masks forgot than the arm. All intervals are 95%.
    """
    by_name = {result.name: result for result in results}
    ours, base = by_name[OURS].measured, by_name[BASE].measured
    rows = []
    for result in results:
        measured = result.measured
        row: dict[str, Any] = {
            "arm": result.name,
            "experts_per_batch": result.experts_per_batch,
            "trainable_parameters": result.trainable_parameters,
            "train_seconds": result.train_seconds,
        }
        rates = summarise(measured.answers)
        neutral = {"neutral_before": measured.neutral, "neutral_after": ours.neutral}
        to_ours = paired_changes(measured.answers, ours.answers, **neutral)
        forgotten = _forgotten(base, measured)
        for name in ("unsafe_refusal_rate", "safe_refusal_rate"):
            row |= _columns(name, rates[name]) | _columns(f"ours_minus_{name}", to_ours[name])
        row |= _columns("safe_target_loss", forgotten["target_loss"])
        row |= _columns("neutral_loss", forgotten["neutral_loss"])
        row |= _columns("ours_minus_neutral_loss", to_ours["neutral_loss"])
        rows.append(row)
    return pd.DataFrame(rows)


def figure_in_columns(row: Mapping[str, Any], name: str) -> dict[str, Any] | None:
    """A figure (`value`, `low`, `high`, `n`) of a row of the table; None where it was not measured.

    Args:
        row: of `comparison_table`, by column.
        name: of the figure, without an ending.
    """
    if name not in row or pd.isna(row[name]):
        return None
    return {key: row.get(f"{name}{ending}") for key, ending in _ENDINGS.items()}


def _forgotten(base: Measured, after: Measured) -> dict[str, Any]:
    """What a model lost on safe examples' targets and neutral text, as differences to the base model."""
    safe = [answers[answers["label"] == "safe"] for answers in (base.answers, after.answers)]
    return paired_changes(*safe, neutral_before=base.neutral, neutral_after=after.neutral)


def _columns(name: str, figure: Mapping[str, Any] | None) -> dict[str, Any]:
    figure = figure or {}
    return {f"{name}{ending}": figure.get(key) for key, ending in _ENDINGS.items()}
