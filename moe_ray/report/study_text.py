"""What sweeps, rounds and comparisons found, in words and as table rows."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, cast

import pandas as pd

from moe_ray.report.format import MISSING, Shown, Unit, decimal, difference, is_significant, rate, setting
from moe_ray.run_directory import HEAT_MAP_PICTURES, WINNER
from moe_ray.studies.baselines import OURS
from moe_ray.studies.comparison import BASE, figure_in_columns
from moe_ray.studies.rounds import RoundReport


def verdict(table: pd.DataFrame) -> str:
    """What a comparison says about per-batch masks: which differences are significant, and which are not.

    Args:
        table: from `comparison_table`.
    """
    arms = _baselines(table)
    if arms.empty:
        return "No baseline was run, so nothing is said about per-batch masks."
    lines = []
    for label, more, less in (("unsafe", "better", "worse"), ("safe", "worse", "better")):
        name = f"ours_minus_{label}_refusal_rate"
        words = (f"more often ({more}) than", f"less often ({less}) than")
        lines.append(
            f"Per-batch masks refused {label} prompts (n = {_n(arms, name)}) {_differences(arms, name, words, 'points')}."
        )
    name = "ours_minus_neutral_loss"
    known = arms[arms[name].notna()]
    if len(known):
        words = ("more (worse) than", "less (better) than")
        lines.append(
            f"On neutral text (n = {_n(known, name)}) they forgot {_differences(known, name, words, 'nats/token')}."
        )
    lines.append(
        f"Brackets are 95% intervals, each on its own: they are not corrected for {len(arms)} comparisons. Every arm was "
        "trained once, in the same order, so they do not cover what another seed would change."
    )
    return "\n".join(lines)


def _baselines(table: pd.DataFrame) -> pd.DataFrame:
    return table[~table["arm"].isin([OURS, BASE])]


def _n(arms: pd.DataFrame, name: str) -> int:
    return int(arms[f"{name}_n"].iloc[0])


def _differences(arms: pd.DataFrame, name: str, words: tuple[str, str], unit: Unit) -> str:
    """The arms that a figure is significantly larger than, smaller than, and neither.

    Args:
        arms: rows of the comparison.
        name: of a difference to per-batch masks.
        words: for those it is larger than, and for those it is smaller than.
        unit: of the difference.
    """
    larger, smaller, neither = words[0], words[1], "with no significant difference from"
    groups: dict[str, list[str]] = {larger: [], smaller: [], neither: []}
    for arm in arms.to_dict("records"):
        figure = figure_in_columns(cast("Mapping[str, Any]", arm), name)
        if figure is None or not is_significant(figure):
            groups[neither].append(str(arm["arm"]))
        else:
            side = larger if figure["low"] > 0 else smaller
            groups[side].append(f"{arm['arm']} ({difference(figure, unit)})")
    return "; ".join(f"{said} {', '.join(group)}" for said, group in groups.items() if group)


def comparison_rows(table: pd.DataFrame) -> pd.DataFrame:
    """A comparison as text, one row per arm; columns in which nothing was measured are left out.

    Args:
        table: from `comparison_table`.
    """
    compared = set(_baselines(table)["arm"])
    rows = []
    for arm in cast("list[dict[str, Any]]", table.to_dict("records")):
        figure = {name: figure_in_columns(arm, name) for name in _FIGURES}
        ours_minus = {
            title: _on_two_lines(difference(figure[name], unit).without_unit()) if arm["arm"] in compared else ""
            for title, name, unit in _DIFFERENCES
        }
        experts = "all" if arm["arm"] == "full" else _decimal_or_empty(arm["experts_per_batch"])
        rows.append(
            {
                "arm": str(arm["arm"]),
                "experts\nper\nbatch": experts,
                "parameters": f"{arm['trainable_parameters']:,}",
                "train s": decimal(arm["train_seconds"], 1),
                "unsafe\nrefused": _on_two_lines(rate(figure["unsafe_refusal_rate"])),
                "safe\nrefused": _on_two_lines(rate(figure["safe_refusal_rate"])),
                "rise of\nsafe loss": difference(figure["safe_target_loss"], "nats/token").value,
                "rise of\nneutral\nloss": difference(figure["neutral_loss"], "nats/token").value,
                **ours_minus,
            }
        )
    frame = pd.DataFrame(rows)
    return frame.loc[:, ~frame.isin(["", MISSING]).all()]


# Heads on several lines leave the width of a terminal to the numbers.
_DIFFERENCES: tuple[tuple[str, str, Unit], ...] = (
    (f"{OURS}\n− arm,\nunsafe\n(points)", "ours_minus_unsafe_refusal_rate", "points"),
    (f"{OURS}\n− arm,\nsafe\n(points)", "ours_minus_safe_refusal_rate", "points"),
    (f"{OURS}\n− arm,\nneutral\n(nats/token)", "ours_minus_neutral_loss", "nats/token"),
)

_FIGURES = (
    "unsafe_refusal_rate",
    "safe_refusal_rate",
    "safe_target_loss",
    "neutral_loss",
    *(name for _, name, _ in _DIFFERENCES),
)


def _on_two_lines(shown: Shown) -> str:
    """The interval below the value: side by side, a comparison's columns would not fit a terminal."""
    return "\n".join(part for part in (shown.value, shown.interval) if part)


def _decimal_or_empty(number: float | None) -> str:
    return "" if pd.isna(number) else decimal(number, 1)


def trial_rows(trials: pd.DataFrame, settings: list[str]) -> pd.DataFrame:
    """The trials of a sweep as text, the best first.

    Args:
        trials: ranked.
        settings: the columns that were searched.
    """
    rows = []
    for rank, trial in enumerate(trials.to_dict("records"), start=1):
        row = {"": str(rank), **{key.rpartition(".")[2]: setting(trial[key]) for key in settings}}
        if trial["state"] == "failed":
            rows.append(row | {"note": "could not be trained"})
            continue
        notes = [] if trial["state"] == "finished" else [f"stopped after epoch {int(trial['epochs'])}"]
        if not trial["is_within_bound"]:
            notes.append("forgets more than sweep.max_forgetting")
        rows.append(
            row
            | {
                "objective": decimal(trial["objective"]),
                "unsafe\nrefused": str(rate(trial["unsafe_refusal_rate"])),
                "safe\nrefused": str(rate(trial["safe_refusal_rate"])),
                "forgetting\n(nats/token)": difference(trial["forgetting"], "nats/token").value,
                "union": str(int(trial["union_experts"])),
                "identify s": decimal(trial["identify_seconds"], 2),
                "train s": decimal(trial.get("train_seconds"), 1),
                "note": "; ".join(notes),
            }
        )
    return pd.DataFrame(rows).fillna("")


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
