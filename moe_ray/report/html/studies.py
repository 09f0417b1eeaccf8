"""The page's part on sweeps, rounds, training and baselines."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, cast

import pandas as pd

from moe_ray.evaluation.intervals import rate
from moe_ray.report.html import figures
from moe_ray.report.html.examples import _printable_lines
from moe_ray.report.html.experts import _limited
from moe_ray.report.printable import printable
from moe_ray.run_directory import FINETUNE, SWEEP, RunDirectory
from moe_ray.studies.heat_map import map_of_trials
from moe_ray.studies.search_space import read_space


def _baselines_part(run: RunDirectory) -> dict[str, Any] | None:
    """A row for every arm: its rates, what it forgot, and how ours differ from it."""
    if run.comparison is None:
        return None
    table, verdict = run.comparison
    rows = []
    for arm in cast("list[dict[str, Any]]", table.to_dict("records")):
        rates = ("unsafe_refusal_rate", "safe_refusal_rate", "neutral_loss")
        names = [*rates, *(f"ours_minus_{name}" for name in rates)]
        rows.append({"arm": printable(str(arm["arm"])), **{name: _figure_of(arm, name) for name in names}})
    return {"rows": rows, "verdict": _printable_lines(verdict).splitlines()}


def _figure_of(row: Mapping[str, Any], name: str) -> dict[str, Any] | None:
    """A figure that a table keeps in columns; None where it was not measured."""
    if name not in row or pd.isna(row[name]):
        return None
    return {"value": row[name], "low": row[f"{name}_low"], "high": row[f"{name}_high"], "n": row.get(f"{name}_n")}


def _sweep_part(drawn: dict[str, str], run: RunDirectory) -> dict[str, Any] | None:
    """The trials, the best first, and a heat map of those that were finished."""
    manifest = run.manifest(SWEEP)
    if run.trials is None or manifest is None:
        return None
    notes, trials = manifest["notes"], run.trials
    space = read_space(run.config)
    shown = map_of_trials(trials, space, notes["winner"])
    drawn["sweep"] = figures.trials("sweep", f"{notes['objective']} of the sweep's trials", shown)
    names = ("unsafe_refusal_rate", "safe_refusal_rate", "objective", "forgetting", "union_experts")
    rows = []
    whole = trials.reindex(columns=list(dict.fromkeys([*trials, *names])))
    for trial in cast("list[dict[str, Any]]", whole.to_dict("records")):
        known = {name: None if pd.isna(trial[name]) else trial[name] for name in names}
        within = trial.get("is_within_bound")
        rows.append(
            {
                **known,
                "settings": [printable(str(trial[key])) for key in space.settings],
                "state": trial["state"],
                "over": trial["state"] == "finished" and not within,
            }
        )
    return {
        **notes,
        "settings": space.settings,
        "winner_rate": _winner_rate(run, trials),
        "max_forgetting": run.config.sweep.max_forgetting,
        "has_stars": bool(shown.over.any(axis=None)),
        **_limited(rows),
    }


def _winner_rate(run: RunDirectory, trials: pd.DataFrame) -> dict[str, Any] | None:
    """The winner's refusal rate on unsafe validation prompts, and how many other finished trials lie in its interval."""
    validation = run.validation
    finished = trials[trials["state"] == "finished"]
    if validation is None or finished.empty:
        return None
    n = int((validation["label"] == "unsafe").sum())
    won = rate(round(float(finished["unsafe_refusal_rate"].iloc[0]) * n), n)
    others = finished["unsafe_refusal_rate"].iloc[1:]
    return won.as_dict() | {"alike": int(others.between(won.low, won.high).sum()), "others": len(others)}


def _rounds_part(run: RunDirectory) -> dict[str, Any] | None:
    """What each round of fine-tuning did on the validation split."""
    tuned = run.manifest(FINETUNE)
    if tuned is None or "rounds" not in tuned["notes"]:
        return None
    notes, settings = tuned["notes"], run.config.rounds
    return {
        "rows": notes["rounds"],
        "kept": notes["kept_round"],
        "stopped_because": printable(notes["stopped_because"]),
        "target": settings.target,
        "action": settings.action,
        "num_batches": len(run.masks.batch_idx),
    }


def _training_part(drawn: dict[str, str], run: RunDirectory) -> dict[str, Any] | None:
    history, tuned = run.history, run.manifest(FINETUNE)
    if history is None:
        return None
    drawn["training"] = figures.training_curves("training", "Training loss and gradient norm by step", history)
    ends = [float(history.loc[history["epoch"] == epoch, "loss"].mean()) for epoch in (0, history["epoch"].max())]
    notes = {} if tuned is None else tuned["notes"]
    return {
        "steps": len(history),
        "epochs": int(history["epoch"].max()) + 1,
        "first": ends[0],
        "last": ends[1],
        **notes,
    }
