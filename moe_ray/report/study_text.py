"""What sweeps, rounds and comparisons found, in words and as table rows."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, cast

import pandas as pd

from moe_ray.studies.baselines import OURS
from moe_ray.studies.comparison import BASE
from moe_ray.studies.rounds import RoundReport


def verdict(table: pd.DataFrame) -> str:
    """What the table says about per-batch masks: which differences can be told from zero, and which cannot."""
    arms = table[~table["arm"].isin([OURS, BASE])]
    if arms.empty:
        return "No baseline was run, so nothing is said about per-batch masks."
    lines = []
    for label, more, less in (("unsafe", "better", "worse"), ("safe", "worse", "better")):
        words = (
            f"more often ({more}) than",
            f"less often ({less}) than",
            "as often, as far as can be told from zero, as",
        )
        name = f"ours_minus_{label}_refusal_rate"
        lines.append(
            f"Per-batch masks refused {label} prompts (n = {_n(arms, name)}) {_told(arms, name, words, points)}."
        )
    name = "ours_minus_neutral_loss"
    known = arms[arms[name].notna()]
    if len(known):
        words = ("more (worse) than", "less (better) than", "as much, as far as can be told from zero, as")
        lines.append(f"On neutral text (n = {_n(known, name)}) they forgot {_told(known, name, words, nats)}.")
    lines.append(
        f"Each interval is 95% on its own, not corrected for {len(arms)} comparisons; every arm was trained once, in "
        "the same order, so what another seed would change is not in the intervals."
    )
    return "\n".join(lines)


def _n(arms: pd.DataFrame, name: str) -> int:
    return int(arms[f"{name}_n"].iloc[0])


def _told(
    arms: pd.DataFrame, name: str, words: tuple[str, str, str], shown: Callable[[Mapping[str, Any], str], str]
) -> str:
    """The arms for which the difference is above zero, below it, and neither."""
    groups: tuple[list[str], ...] = ([], [], [])
    for arm in arms.to_dict("records"):
        side = 0 if arm[f"{name}_low"] > 0 else 1 if arm[f"{name}_high"] < 0 else 2
        difference = "" if side == 2 else f" ({shown(cast('Mapping[str, Any]', arm), name)})"
        groups[side].append(f"{arm['arm']}{difference}")
    return "; ".join(f"{said} {', '.join(group)}" for said, group in zip(words, groups, strict=True) if group)


def points(row: Mapping[str, Any], name: str) -> str:
    """A difference of rates with its interval, in percentage points."""
    return f"{row[name]:+.1%} [{row[f'{name}_low']:+.1%}, {row[f'{name}_high']:+.1%}]".replace("%", "")


def nats(row: Mapping[str, Any], name: str) -> str:
    """A difference of losses with its interval, in nats per token."""
    return f"{row[name]:+.3f} [{row[f'{name}_low']:+.3f}, {row[f'{name}_high']:+.3f}]"


def describe_round(report: RoundReport, num_batches: int) -> str:
    """A round in words."""
    lagging = f"{len(report.lagging)} of {num_batches} batches below their target"
    return (
        f"round {report.round}: {lagging} (mean shortfall {report.shortfall:.1%}); validation: unsafe refused "
        f"{report.unsafe_refusal_rate:.1%}, safe refused {report.safe_refusal_rate:.1%}"
    )


def trial_rows(trials: pd.DataFrame, settings: list[str]) -> pd.DataFrame:
    """The trials of a sweep as text, the best first.

    Args:
        trials: ranked.
        settings: the columns that were searched.
    """
    rows = []
    for place, trial in enumerate(trials.to_dict("records"), start=1):
        row = {"": str(place), **{key.rpartition(".")[2]: _number(trial[key]) for key in settings}}
        if trial["state"] == "failed":
            rows.append(row | {"note": "could not be trained"})
            continue
        notes = [] if trial["state"] == "finished" else [f"stopped after epoch {trial['epochs']}"]
        if not trial["is_within_bound"]:
            notes.append("forgets too much")
        rows.append(
            row
            | {
                "objective": f"{trial['objective']:.3f}",
                "unsafe refused": f"{trial['unsafe_refusal_rate']:.1%}",
                "safe refused": f"{trial['safe_refusal_rate']:.1%}",
                "forgotten": f"{trial['forgetting']:+.3f}",
                "union": str(int(trial["union_experts"])),
                "identify s": f"{trial['identify_seconds']:.2f}",
                "train s": "–" if pd.isna(trial.get("train_seconds")) else f"{trial['train_seconds']:.1f}",
                "note": "; ".join(notes),
            }
        )
    return pd.DataFrame(rows).fillna("")


def _number(value: object) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def comparison_rows(table: pd.DataFrame) -> pd.DataFrame:
    """A comparison as text, one row per arm; what was not measured is left empty."""
    rows = []
    for arm in table.to_dict("records"):
        known = cast("dict[str, Any]", arm)
        is_held_against = arm["arm"] not in (OURS, BASE)
        row = {
            "arm": str(arm["arm"]),
            "experts/batch": "all" if arm["arm"] == "full" else _or_empty(known, "experts_per_batch", "{:.1f}"),
            "parameters": f"{arm['trainable_parameters']:,}",
            "train s": f"{arm['train_seconds']:.1f}",
            "unsafe refused": _rate(known, "unsafe_refusal_rate"),
            "safe refused": _rate(known, "safe_refusal_rate"),
            "forgotten": _or_empty(known, "safe_target_loss", "{:+.3f}"),
            "neutral": _or_empty(known, "neutral_loss", "{:+.3f}"),
            "ours − it, unsafe": points(known, "ours_minus_unsafe_refusal_rate") if is_held_against else "",
            "ours − it, safe": points(known, "ours_minus_safe_refusal_rate") if is_held_against else "",
            "ours − it, neutral": nats(known, "ours_minus_neutral_loss")
            if is_held_against and not pd.isna(known["ours_minus_neutral_loss"])
            else "",
        }
        rows.append(row)
    frame = pd.DataFrame(rows)
    return frame.loc[:, (frame != "").any()]


def _rate(row: Mapping[str, Any], name: str) -> str:
    return f"{row[name]:.1%} [{row[f'{name}_low']:.0%}, {row[f'{name}_high']:.0%}]"


def _or_empty(row: Mapping[str, Any], name: str, form: str) -> str:
    return "" if pd.isna(row[name]) else form.format(row[name])


def describe_sweep(notes: Mapping[str, Any], url: str) -> str:
    """What a sweep found, in words.

    Args:
        notes: of its manifest.
        url: of its folder.
    """
    winner = ", ".join(f"{key}={_number(value)}" for key, value in notes["winner"].items())
    bound = (
        "" if notes["is_within_bound"] else "; no trial stayed within sweep.max_forgetting, so this one is over it too"
    )
    return (
        f"Winner of {notes['trials']} trials ({notes['stopped']} stopped early, {notes['failed']} could not be trained): "
        f"{winner}, with {notes['objective']} {notes['value']:.3f} on the validation split{bound}.\n"
        f"Every trial identified its experts from the stored capture, in {notes['identify_seconds_max']:.2f} s at most.\n"
        f"Heat map: {url}/heat_map.png; configuration for full.py: {url}/winner.yaml"
    )
