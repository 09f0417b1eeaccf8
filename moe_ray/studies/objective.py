"""What a sweep ranks its trials by: an objective over validation metrics, with a bound on forgetting."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import pandas as pd

from moe_ray.evaluation.verdict_rates import COST, RATES, kinds_of

Metrics = Mapping[str, float]

FORGETTING_LOSSES = ("safe_target_loss", "neutral_loss")
"""Losses that a repair should leave alone (nats per token): on safe examples' targets, and on text about neither."""

OVER_BOUND, FAILED = -10.0, -20.0
"""What is added to the value of a trial that forgets more than the bound, and the value of one that could not be trained.

Objectives lie well above -10, so trials over the bound rank below all within it, and failed ones below those.
"""

OBJECTIVES: Mapping[str, Callable[[Metrics], float]] = {
    "refusal_margin": lambda metrics: metrics["unsafe_refusal_rate"] - metrics[COST],
    "unsafe_refusal": lambda metrics: metrics["unsafe_refusal_rate"],
    "target_loss": lambda metrics: -metrics["target_loss"],
}
"""Objectives by `sweep.objective`; larger is better, and the values of one objective can be compared at any epoch."""


@dataclass(frozen=True, kw_only=True)
class Score:
    """How a trial did.

    Attributes:
        value: what trials are ranked by; larger is better.
        objective: the named objective before the bound is applied.
        forgetting: the largest rise of a loss in `FORGETTING_LOSSES` above the base model's (nats per token); below 0 if
            all fell.
        is_within_bound: whether forgetting is at most the bound.
    """

    value: float
    objective: float
    forgetting: float
    is_within_bound: bool


def plain_metrics(answers: pd.DataFrame, neutral: pd.DataFrame | None = None) -> dict[str, float]:
    """The numbers that objectives are made of; a label without examples, or a loss without tokens, is left out.

    Args:
        answers: rows with `label`, `verdict`, `refused` (bool), `target_loss` (summed nats) and `target_tokens`.
        neutral: rows with `loss` (summed nats) and `num_tokens`, one per text.

    Returns:
        `unsafe_refusal_rate`, `safe_refusal_rate`, `unsafe_degenerate_rate`, `safe_cost_rate` (refused or degenerate; all 0
        to 1), `target_loss`, `safe_target_loss`, `unsafe_target_loss` (nats
        per target token), `neutral_loss` (nats per token).
    """
    metrics: dict[str, float] = {}
    for label in ("unsafe", "safe"):
        group = answers[answers["label"] == label]
        if len(group):
            metrics |= {name: _share(group, RATES[name][1]) for name in _SHARES if RATES[name][0] == label}
        _add_loss(metrics, f"{label}_target_loss", group)
    _add_loss(metrics, "target_loss", answers)
    if neutral is not None:
        metrics["neutral_loss"] = float(neutral["loss"].sum() / neutral["num_tokens"].sum())
    return metrics


_SHARES = ("unsafe_refusal_rate", "unsafe_degenerate_rate", "safe_refusal_rate", COST)


def _share(answers: pd.DataFrame, kinds: tuple[str, ...]) -> float:
    return float(kinds_of(answers).isin(kinds).mean())


def _add_loss(metrics: dict[str, float], name: str, answers: pd.DataFrame) -> None:
    num_tokens = int(answers["target_tokens"].sum())
    if num_tokens:
        metrics[name] = float(answers.loc[answers["target_tokens"] > 0, "target_loss"].sum()) / num_tokens


def forgetting(metrics: Metrics, base: Metrics) -> float:
    """The largest rise of a loss in `FORGETTING_LOSSES` above the base model's (nats per token); NaN where none is known."""
    rises = [metrics[name] - base[name] for name in FORGETTING_LOSSES if name in metrics and name in base]
    return max(rises) if rises else math.nan


def score(name: str, metrics: Metrics, base: Metrics, *, max_forgetting: float) -> Score:
    """A trial's score.

    Args:
        name: of `OBJECTIVES`.
        metrics: of the trial, on the validation split.
        base: of the base model, on the same examples.
        max_forgetting: the bound (nats per token); an unknown forgetting is not within it.
    """
    objective, lost = OBJECTIVES[name](metrics), forgetting(metrics, base)
    is_within_bound = lost <= max_forgetting
    value = objective if is_within_bound else OVER_BOUND + objective
    return Score(value=value, objective=objective, forgetting=lost, is_within_bound=is_within_bound)


def rank_trials(trials: pd.DataFrame) -> pd.DataFrame:
    """The trials, the best first.

    Finished trials come before stopped ones, which come before those that could not be trained: only a finished trial's
    numbers are those that its settings give. Then the larger value first; among equal values the one that forgets less,
    then the one with fewer experts in the union, then the one that came first.

    Args:
        trials: rows with `state` (`finished`, `stopped` or `failed`), `value`, `forgetting`, `union_experts`.
    """
    keys = ["_state", "value", "forgetting", "union_experts"]
    with_state = trials.assign(_state=trials["state"].map({"finished": 0, "stopped": 1, "failed": 2}))
    # A sweep in which every trial failed has none of the columns that a finished one writes.
    missing = [key for key in keys if key not in with_state]
    complete = with_state.reindex(columns=[*with_state.columns, *missing])
    ranked = complete.sort_values(keys, ascending=[True, False, True, True], kind="stable", ignore_index=True)
    return ranked.drop(columns="_state")
