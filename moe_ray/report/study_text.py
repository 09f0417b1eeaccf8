"""What sweeps and rounds found, in words and as table rows; `comparison_text` has what comparisons found."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pandas as pd

from moe_ray.evaluation.verdict_rates import COST
from moe_ray.report.format import decimal, difference, rate, setting
from moe_ray.run_directory import HEAT_MAP_PICTURES, WINNER
from moe_ray.studies.pareto import BENEFIT, COST_IN_WORDS, cost_of, pareto_front
from moe_ray.studies.rounds import RoundReport


def trial_rows(trials: pd.DataFrame, settings: list[str]) -> pd.DataFrame:
    """The trials of a sweep as text, the best first.

    Args:
        trials: ranked.
        settings: the columns that were searched.
    """
    rows, front = [], pareto_front(trials)
    for rank, (trial, is_on_front) in enumerate(zip(trials.to_dict("records"), front, strict=True), start=1):
        row = {"": str(rank), **{key.rpartition(".")[2]: setting(trial[key]) for key in settings}}
        if trial["state"] == "failed":
            rows.append(row | {"note": "could not be trained"})
            continue
        notes = [] if trial["state"] == "finished" else [f"stopped after epoch {int(trial['epochs'])}"]
        if not trial["is_within_bound"]:
            notes.append("forgets more than sweep.max_forgetting")
        if is_on_front:
            notes.append("Pareto front")
        rows.append(
            row
            | {
                "objective": decimal(trial["objective"]),
                "unsafe\nrefused": str(rate(trial["unsafe_refusal_rate"])),
                "safe refused\nor degenerate": str(rate(trial.get(COST, trial["safe_refusal_rate"]))),
                "forgetting\n(nats/token)": difference(trial["forgetting"], "nats/token").value,
                "union": str(int(trial["union_experts"])),
                "identify s": decimal(trial["identify_seconds"], 2),
                "train s": decimal(trial.get("train_seconds"), 1),
                "note": "; ".join(notes),
            }
        )
    return pd.DataFrame(rows).fillna("")


def describe_front(trials: pd.DataFrame, settings: list[str]) -> str:
    """The trials that no other beats in both, unsafe prompts refused and what that costs; empty where none finished.

    Args:
        trials: ranked; the first is the winner.
        settings: the columns that were searched.
    """
    front = pareto_front(trials)
    if not front.any():
        return ""
    trials = trials.assign(**{COST: cost_of(trials)})
    points = trials[front].sort_values([COST, BENEFIT]).drop_duplicates([COST, BENEFIT])
    named = "; ".join(
        f"{rate(row[BENEFIT])} for {rate(row[COST])} ({describe_settings({key: row[key] for key in settings})})"
        for row in points.to_dict("records")
    )
    winner = "is on it" if front.iloc[0] else "is not on it"
    return f"Pareto front, unsafe prompts refused for {COST_IN_WORDS}: {named}. The winner {winner}."


def describe_settings(settings: Mapping[str, Any]) -> str:
    """Settings as `identify.threshold=0.05, identify.top_k=12`."""
    return ", ".join(f"{key}={setting(value)}" for key, value in settings.items())


def describe_sweep(notes: Mapping[str, Any], url: str) -> str:
    """What a sweep found, in words.

    Args:
        notes: of its manifest.
        url: of its folder.
    """
    bound = (
        ""
        if notes["is_within_bound"]
        else "; every trial forgets more than sweep.max_forgetting allows, this one included"
    )
    return (
        f"Winner of {notes['trials']} trials ({notes['stopped']} stopped early, {notes['failed']} could not be trained): "
        f"{describe_settings(notes['winner'])}, with {notes['objective']} {decimal(notes['value'])} on the validation "
        f"split{bound}.\n"
        "Every trial identified its experts from the stored capture, within "
        f"{decimal(notes['identify_seconds_max'], 2)} s.\n"
        f"Heat map: {url}/{HEAT_MAP_PICTURES[0]}; configuration for `moe-ray full`: {url}/{WINNER}"
    )


def describe_round(report: RoundReport, num_batches: int) -> str:
    """A round in words.

    Args:
        report: of the round.
        num_batches: batches that have a target.
    """
    return (
        f"round {report.round}: {len(report.lagging)} of {num_batches} batches are below their target (mean shortfall "
        f"{rate(report.shortfall)}); on the validation split, {rate(report.unsafe_refusal_rate)} of unsafe and "
        f"{rate(report.safe_refusal_rate)} of safe prompts are refused"
    )
