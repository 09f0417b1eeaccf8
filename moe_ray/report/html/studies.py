"""The page's part on sweeps, rounds, training and baselines: numbers and words; `run_figures` draws them."""

from __future__ import annotations

from typing import Any, cast

import pandas as pd

from moe_ray.evaluation.intervals import rate as rate_of
from moe_ray.evaluation.verdict_rates import COST
from moe_ray.report.format import decimal, difference, rate, setting, significant_digits
from moe_ray.report.html.shortened import first_rows
from moe_ray.report.printable import printable, printable_lines
from moe_ray.report.study_text import describe_front
from moe_ray.run_directory import FINETUNE, SWEEP, RunDirectory
from moe_ray.studies.comparison import figure_in_columns, share_to_judge
from moe_ray.studies.heat_map_table import HeatMap, map_of_trials
from moe_ray.studies.pareto import pareto_front
from moe_ray.studies.search_space import read_space


def baselines_part(run: RunDirectory) -> dict[str, Any] | None:
    """A row for every arm: its rates, what it forgot, and how per-batch masks differ from it.

    At the share of steps that arms are judged at; `run_figures` draws the curve over all shares.
    """
    if run.comparison is None:
        return None
    table, verdict = run.comparison
    share, _ = share_to_judge(table)
    has_curve = table["share"].nunique() > 1
    table = table[table["share"] == share]
    has_others = bool(table.get("other_unsafe_refusal_rate", pd.Series(dtype=float)).notna().any())
    rows = []
    for arm in cast("list[dict[str, Any]]", table.to_dict("records")):
        rates = [rate(figure_in_columns(arm, f"{label}_refusal_rate")) for label in ("unsafe", "safe")]
        losses = [figure_in_columns(arm, name) for name in ("neutral_loss", "ours_minus_neutral_loss")]
        forgotten, more_forgotten = (difference(figure, "nats/token").without_unit() for figure in losses)
        to_ours = [
            difference(figure_in_columns(arm, f"ours_minus_{label}_refusal_rate"), "points").without_unit()
            for label in ("unsafe", "safe")
        ]
        parameters = f"{int(arm['trainable_parameters']):,}"
        safe_lost = difference(figure_in_columns(arm, "safe_target_loss"), "nats/token").without_unit()
        others = [
            rate(figure_in_columns(arm, "other_unsafe_refusal_rate")),
            difference(figure_in_columns(arm, "other_safe_target_loss"), "nats/token").without_unit(),
        ]
        cells = [*rates, safe_lost, forgotten, *(others if has_others else ()), *to_ours, more_forgotten]
        rows.append({"arm": printable(str(arm["arm"])), "parameters": parameters, "cells": cells})
    return {
        "rows": rows,
        "verdict": printable_lines(verdict).splitlines(),
        "share": f"{share:.0%}",
        "budget": run.config.compare.budget,
        "has_curve": has_curve,
        "has_others": has_others,
        "has_transfer": run.transfer is not None,
    }


def sweep_map(run: RunDirectory) -> HeatMap | None:
    """The sweep's finished trials over two settings; None where no sweep was run."""
    manifest = run.manifest(SWEEP)
    if run.trials is None or manifest is None:
        return None
    return map_of_trials(run.trials, read_space(run.config), manifest["notes"]["winner"])


def sweep_part(run: RunDirectory) -> dict[str, Any] | None:
    """The trials, the best first, and what the sweep found."""
    manifest, shown = run.manifest(SWEEP), sweep_map(run)
    if run.trials is None or manifest is None or shown is None:
        return None
    notes, settings = manifest["notes"], read_space(run.config).settings
    rows = [
        {
            "settings": [printable(setting(trial[key])) for key in settings],
            "objective": decimal(trial.get("objective")),
            "unsafe": str(rate(trial.get("unsafe_refusal_rate"))),
            "safe": str(rate(trial.get(COST, trial.get("safe_refusal_rate")))),
            "forgetting": difference(trial.get("forgetting"), "nats/token").value,
            "is_over": trial["state"] == "finished" and not trial.get("is_within_bound"),
            "union": decimal(trial.get("union_experts"), 0),
            "state": f"{trial['state']}, Pareto front" if is_on_front else trial["state"],
        }
        for trial, is_on_front in zip(
            cast("list[dict[str, Any]]", run.trials.to_dict("records")), pareto_front(run.trials), strict=True
        )
    ]
    return {
        **{name: notes[name] for name in ("trials", "stopped", "failed", "objective", "is_within_bound")},
        "identify_seconds": decimal(notes["identify_seconds_max"], 2),
        "settings": settings,
        "winner_rate": _winner_rate(run, run.trials),
        "max_forgetting": significant_digits(run.config.sweep.max_forgetting),
        "front": printable(describe_front(run.trials, list(settings))),
        "has_stars": bool(shown.over.any(axis=None)),
        **first_rows(rows),
    }


def _winner_rate(run: RunDirectory, trials: pd.DataFrame) -> dict[str, Any] | None:
    """The winner's refusal rate on unsafe validation prompts, and how many other finished trials lie in its interval."""
    validation = run.validation
    finished = trials[trials["state"] == "finished"]
    if validation is None or len(finished) < 2:
        return None
    n = int((validation["label"] == "unsafe").sum())
    # Trials are stored with rates only: the winner's hits are its rate times the prompts that all trials answered.
    won = rate_of(round(float(finished["unsafe_refusal_rate"].iloc[0]) * n), n)
    others = finished["unsafe_refusal_rate"].iloc[1:]
    return {
        "rate": rate(won.as_dict()),
        "n": n,
        "alike": int(others.between(won.low, won.high).sum()),
        "others": len(others),
    }


def rounds_part(run: RunDirectory) -> dict[str, Any] | None:
    """What each round of fine-tuning did on the validation split."""
    tuned = run.manifest(FINETUNE)
    if tuned is None or "rounds" not in tuned["notes"]:
        return None
    notes, settings = tuned["notes"], run.config.rounds
    rows = [
        {
            "round": report["round"],
            "is_kept": report["round"] == notes["kept_round"],
            "lagging": len(report["lagging"]),
            "shortfall": str(rate(report["shortfall"])),
            "unsafe": str(rate(report["unsafe_refusal_rate"])),
            "safe": str(rate(report["safe_refusal_rate"])),
        }
        for report in notes["rounds"]
    ]
    return {
        "rows": rows,
        "kept": notes["kept_round"],
        "stopped_because": printable(notes["stopped_because"]),
        "target": str(rate(settings.target)),
        "action": settings.action,
        "num_batches": len(run.masks.batch_idx),
    }


def training_part(run: RunDirectory) -> dict[str, Any] | None:
    """How long training took and how far its loss fell; with how many parameters, where the stage is finished."""
    history, tuned = run.history, run.manifest(FINETUNE)
    if history is None:
        return None
    last = int(history["epoch"].max())
    means = [float(history.loc[history["epoch"] == epoch, "loss"].mean()) for epoch in (0, last)]
    part = {"steps": len(history), "epochs": last + 1, "first": decimal(means[0]), "last": decimal(means[1])}
    notes = {} if tuned is None else tuned["notes"]
    if "trainable_parameters" in notes:
        part |= {name: f"{notes[f'{name}_parameters']:,}" for name in ("trainable", "total")}
        part["changed"] = f"{notes['frozen_parameters_changed']:,}"
    return part
