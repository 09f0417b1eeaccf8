"""Tables in the terminal: any rows of text under a title, and the three that end a run."""

from __future__ import annotations

import re
import sys
from collections.abc import Mapping, Sequence
from typing import Any

import pandas as pd
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from moe_ray.report.before_after import WHENS, before_after_table
from moe_ray.report.format import decimal
from moe_ray.report.printable import printable, printable_lines
from moe_ray.report.truth_text import truth_in_words, truth_rows
from moe_ray.run_directory import FINETUNE, IDENTIFY, REPORT, SUMMARY
from moe_ray.storage.folder import Folder

_WIDTH_OF_A_LOG = 160
"""Characters per line where the output is no terminal."""

_NUMBER = re.compile(r"[+-]?\d[\d.,]*%?(\s|$)")
"""How a cell of a column of numbers begins: `5.0% [...]` does, an id such as `3fa2` does not."""


def print_result(summary: Mapping[str, Any], reused: Sequence[str], artifacts: Mapping[str, str]) -> None:
    """Prints the end of a run: before and after with intervals, where the time went, and where everything is.

    Args:
        summary: with `before`, `after`, `change`, `seconds`, `start_seconds`.
        reused: stages that an earlier run had done.
        artifacts: where each thing is.
    """
    print_table("Before and after (held out, 95% intervals)", before_after_table([summary.get(when) for when in WHENS]))
    if summary.get("truth") is not None:
        print_table(
            "Found, where it is known", truth_rows(summary["truth"]), caption=truth_in_words(summary["truth"])[0]
        )
    print_table("Seconds", _seconds_table(summary["seconds"], summary["start_seconds"], reused))
    print_table("Where it is", pd.DataFrame(artifacts.items(), columns=["what", "where"]))


def _seconds_table(seconds: Mapping[str, float], start: Mapping[str, float], reused: Sequence[str]) -> pd.DataFrame:
    """Where the time went: what was waited for while processes started, and the work; reused stages took none now."""
    rows = [
        (
            f"{name} (reused)" if name in reused else name,
            decimal(start.get(name, 0.0), 1),
            decimal(value - start.get(name, 0.0), 1),
            decimal(value, 1),
        )
        for name, value in seconds.items()
    ]
    return pd.DataFrame(rows, columns=["", "starting processes", "work", "both"])


def print_table(title: str, rows: pd.DataFrame, *, caption: str = "") -> None:
    """Prints rows of text under a title; columns of numbers are flush right, all others flush left.

    Args:
        title: above the table.
        rows: cells as text, which may have line ends.
        caption: below it.
    """
    width = None if sys.stdout.isatty() else _WIDTH_OF_A_LOG
    console = Console(file=sys.stdout, width=width, highlight=False)
    table = Table(box=SIMPLE_HEAD, show_edge=False, pad_edge=False)
    for name in rows.columns:
        is_number = any(_NUMBER.match(str(cell)) for cell in rows[name])
        table.add_column(escape(printable_lines(str(name))), justify="right" if is_number else "left", overflow="fold")
    for row in rows.itertuples(index=False):
        table.add_row(*(escape(printable_lines(str(cell))) for cell in row))
    console.print(f"\n== {escape(printable(title))} ==")
    console.print(table)
    for line in caption.splitlines():
        console.print(escape(printable(line)), soft_wrap=True)


def artifacts_of(folder: Folder, tracking_uri: str, run_id: str) -> dict[str, str]:
    """What a person opens next, and where it is."""
    names = (REPORT, SUMMARY, IDENTIFY, FINETUNE)
    return {name: f"{folder.url}/{name}" for name in names} | {"MLflow": tracking_uri, "MLflow run": run_id}
