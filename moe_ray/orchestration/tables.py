"""Tables in the terminal."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import Any, cast

import pandas as pd
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from moe_ray.baselines import OURS
from moe_ray.comparison import BASE, nats, points
from moe_ray.report import printable

_WIDTH_OF_A_LOG = 160


def print_table(title: str, rows: pd.DataFrame, *, caption: str = "") -> None:
    """Prints rows of text under a title; the first column and what is no number are flush left.

    Args:
        title: above the table.
        rows: cells as text.
        caption: below it.
    """
    console = Console(file=sys.stdout, width=None if sys.stdout.isatty() else _WIDTH_OF_A_LOG, highlight=False)
    table = Table(box=SIMPLE_HEAD, title_justify="left", show_edge=False, pad_edge=False)
    for position, name in enumerate(rows.columns):
        table.add_column(escape(str(name)), justify="left" if position == 0 else "right", overflow="fold")
    for row in rows.itertuples(index=False):
        table.add_row(*(escape(printable(str(cell))) for cell in row))
    console.print(f"\n== {escape(title)} ==")
    console.print(table)
    if caption:
        for line in caption.splitlines():
            console.print(escape(printable(line)), soft_wrap=True)


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
