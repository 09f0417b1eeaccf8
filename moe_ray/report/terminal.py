"""The end of a run in the terminal: before and after with intervals, where the time went, where everything is."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from typing import Any

import pandas as pd
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from moe_ray.report.printable import printable
from moe_ray.run_directory import FINETUNE, IDENTIFY, REPORT, SUMMARY
from moe_ray.storage.folder import Folder

_FIGURES = (
    ("unsafe_refusal_rate", "unsafe refused", True),
    ("safe_refusal_rate", "safe refused", True),
    ("target_loss", "target loss (nats/token)", False),
    ("neutral_loss", "neutral text loss (nats/token)", False),
)


def print_result(summary: Mapping[str, Any], reused: Sequence[str], artifacts: Mapping[str, str]) -> None:
    """Prints the three tables.

    Args:
        summary: with `before`, `after`, `change`, `seconds`.
        reused: stages that an earlier run had done.
        artifacts: where each thing is.
    """
    console = Console(
        file=sys.stdout, width=None if sys.stdout.isatty() else _WIDTH_OF_A_LOG, highlight=False, soft_wrap=False
    )
    for title, table in (
        ("Before and after (held out, 95% intervals)", _rates(summary)),
        ("Seconds", _seconds(summary["seconds"], reused)),
        ("Where it is", _places(artifacts)),
    ):
        console.print(f"\n== {title} ==")
        console.print(table)


def artifacts_of(folder: Folder, tracking_uri: str, run_id: str) -> dict[str, str]:
    """What a person opens next."""
    names = (REPORT, SUMMARY, IDENTIFY, FINETUNE)
    return {name: f"{folder.url}/{name}" for name in names} | {"MLflow": tracking_uri, "MLflow run": run_id}


def _table(*columns: str) -> Table:
    table = Table(box=SIMPLE_HEAD, show_edge=False, pad_edge=False, show_header=any(columns))
    for position, name in enumerate(columns):
        table.add_column(name, justify="right" if position else "left", overflow="fold")
    return table


def _rates(summary: Mapping[str, Any]) -> Table:
    table = _table("", "before", "after", "paired change", "n")
    for routing in ("natural", "masked"):
        blocks = [summary.get(when) or {} for when in ("before", "after", "change")]
        if routing == "masked":
            blocks = [block.get("masked") or {} for block in blocks]
        for key, what, is_rate in _FIGURES:
            own = [block.get(key) for block in blocks]
            if own[0] is None or own[1] is None:
                continue
            name = what if routing == "natural" else f"{what}, masked"
            cells = [_cell(figure, is_rate, is_change=position == 2) for position, figure in enumerate(own)]
            table.add_row(name, *cells, str(own[1]["n"]))
    return table


def _cell(figure: Mapping[str, Any] | None, is_rate: bool, is_change: bool) -> str:
    if figure is None or figure["value"] is None:
        return "–"
    scale, form = (100, ".0f") if is_rate else (1, ".3f")
    sign, unit = "+" if is_change else "", "%" if is_rate and not is_change else ""
    text = f"{scale * figure['value']:{sign}{form}}{unit}"
    if figure.get("low") is None:
        return text
    return escape(f"{text} [{scale * figure['low']:{sign}{form}}, {scale * figure['high']:{sign}{form}}]")


def _seconds(seconds: Mapping[str, float], reused: Sequence[str]) -> Table:
    table = _table("", "")
    for name, value in seconds.items():
        table.add_row(f"{name} (reused)" if name in reused else name, f"{value:.1f}")
    return table


def _places(artifacts: Mapping[str, str]) -> Table:
    table = Table(box=None, show_header=False, pad_edge=False)
    for name, place in artifacts.items():
        table.add_row(name, escape(printable(place)))
    return table


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
