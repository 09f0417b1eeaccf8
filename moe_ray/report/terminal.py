"""What a terminal shows: tables and text of any width, and the end of a run."""

from __future__ import annotations

import os
import re
import shlex
import sys
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd
from rich.box import SIMPLE_HEAD
from rich.cells import cell_len
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from moe_ray.report.format import KEPT_TOGETHER, decimal
from moe_ray.report.printable import printable, printable_lines
from moe_ray.report.run_text import describe_outcome, outcome_tables
from moe_ray.run_directory import FINETUNE, IDENTIFY, REPORT, SUMMARY
from moe_ray.storage.folder import Folder

_WIDTH_OF_A_LOG = 160
"""Characters per line where the output is no terminal and `COLUMNS` says nothing."""

_BETWEEN_COLUMNS = 3
_MOST_OF_A_WORD = 24
"""A word of a column of text that is longer may be cut; a number never is."""

_TIE = "\ue000"
"""Stands for a space at which no line is broken; its character belongs to nobody, and is a cell wide."""

_NUMBER = re.compile(r"[+-]?\d[\d.,]*%?(\s|$)")
"""How a cell of a column of numbers begins: `5.0% [...]` does, an id such as `3fa2` does not."""


def print_result(
    summary: Mapping[str, Any], reused: Sequence[str], artifacts: Mapping[str, str], commands: Mapping[str, str]
) -> None:
    """Prints the end of a run: its outcome, where the time went, where everything is, and what to do with it.

    Args:
        summary: from `build_summary`, with `seconds` and `start_seconds`.
        reused: stages that an earlier run had done.
        artifacts: where each thing is.
        commands: from `next_commands`.
    """
    print_outcome(summary)
    print_table("Seconds", _seconds_table(summary["seconds"], summary["start_seconds"], reused))
    _print_lines("Where it is", artifacts)
    console = _console()
    console.print("\n== What next ==")
    for purpose, command in commands.items():
        console.print(f"{purpose}\n  {escape(printable(command))}", soft_wrap=True)


def print_outcome(summary: Mapping[str, Any]) -> None:
    """Prints the held-out figures before and after with intervals, and what is said of them.

    Args:
        summary: from `build_summary`.
    """
    print_text("Result", describe_outcome(summary))
    for title, table in outcome_tables(summary):
        print_table(title, table)


def _print_lines(title: str, values: Mapping[str, str]) -> None:
    """Names and values; no value is cut or folded, so that it can be copied."""
    widest = max(map(len, values), default=0)
    console = _console()
    console.print(f"\n== {title} ==")
    for name, value in values.items():
        console.print(f"{name:<{widest}}   {escape(printable(value))}", soft_wrap=True)


def print_text(title: str, text: str) -> None:
    """Prints text under a title, its lines broken between words where the terminal ends."""
    console = _console()
    console.print(f"\n== {escape(printable(title))} ==")
    _print_broken(console, text)


def print_answer(text: str) -> None:
    """Prints text without a title, broken as in `print_text` where the output is a terminal; else as it is."""
    if _has_width():
        _print_broken(_console(), text)
    else:
        sys.stdout.write(printable_lines(text) + "\n")


def _print_broken(console: Console, text: str) -> None:
    for line in text.splitlines():
        for part in _broken(printable(line), console.width):
            console.print(escape(part), soft_wrap=True)
    sys.stdout.flush()


def _broken(line: str, width: int) -> list[str]:
    if cell_len(line) <= width:
        return [line]
    indent = line[: len(line) - len(line.lstrip())]
    broken = textwrap.wrap(
        _tied(line), width, subsequent_indent=indent, break_long_words=False, break_on_hyphens=False,
        replace_whitespace=False,
    )  # fmt: skip
    return [part.replace(_TIE, " ") for part in broken] or [line]


def _tied(text: str) -> str:
    """The text with intervals and such as one word."""
    return KEPT_TOGETHER.sub(lambda found: found[0].replace(" ", _TIE), text)


def _console() -> Console:
    return Console(file=sys.stdout, width=None if _has_width() else _WIDTH_OF_A_LOG, highlight=False)


def _has_width() -> bool:
    return sys.stdout.isatty() or bool(os.environ.get("COLUMNS"))


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

    Cells are broken between words, so that no number is cut, and no interval where there is room. Where the columns have no
    room beside each other, each row is printed as lines of its own.

    Args:
        title: above the table.
        rows: cells as text, which may have line ends.
        caption: below it.
    """
    console = _console()
    console.print(f"\n== {escape(printable(title))} ==")
    _print_rows(console, rows)
    _print_broken(console, caption)


def print_frame(frame: pd.DataFrame) -> None:
    """Prints a table of numbers and texts as pandas does, or as `print_table` where a terminal has no room for that."""
    shown = frame.map(lambda value: printable(value) if isinstance(value, str) else value)
    text = shown.to_string(index=False, float_format="{:.3f}".format) if len(shown) else "(none)"
    console = _console()
    if _has_width() and max(map(cell_len, text.splitlines())) > console.width:
        cells = shown.map(lambda value: f"{value:.3f}" if isinstance(value, float) else str(value))
        _print_rows(console, cells)
        sys.stdout.flush()
    else:
        sys.stdout.write(text + "\n")


def _print_rows(console: Console, rows: pd.DataFrame) -> None:
    names = [printable_lines(str(name)) for name in rows.columns]
    cells = [[printable_lines(str(cell)) for cell in row] for row in rows.itertuples(index=False)]
    is_number = [any(_NUMBER.match(row[index]) for row in cells) for index in range(len(names))]
    shown, widths = _laid_out(names, cells, is_number, console.width)
    if widths is None:
        _print_records(console, names, cells)
    else:
        table = Table(box=SIMPLE_HEAD, show_edge=False, pad_edge=False)
        for name, is_right, width in zip(names, is_number, widths, strict=True):
            table.add_column(escape(name), justify="right" if is_right else "left", overflow="fold", width=width)
        for row in shown:
            table.add_row(*map(escape, row))
        with console.capture() as drawn:
            console.print(table)
        sys.stdout.write(drawn.get().replace(_TIE, " "))


def _laid_out(
    names: Sequence[str], cells: Sequence[Sequence[str]], is_number: Sequence[bool], width: int
) -> tuple[Sequence[Sequence[str]], list[int] | None]:
    """The cells, their intervals tied where there is room for that, and the columns' widths; None = no room at all."""
    tied = [list(map(_tied, row)) for row in cells]
    for rows in (tied, cells):
        columns = [[name, *(row[index] for row in rows)] for index, name in enumerate(names)]
        if (widths := _widths(columns, is_number, width)) is not None:
            return rows, widths
    return cells, None


def _widths(columns: Sequence[Sequence[str]], is_number: Sequence[bool], width: int) -> list[int] | None:
    """The columns' widths, each at least that of its longest number or word; None = they have no room for that."""
    if not columns:
        return []
    wanted = [max(cell_len(line) for cell in column for line in cell.split("\n")) for column in columns]
    least = []
    for column, numbers in zip(columns, is_number, strict=True):
        longest = max((cell_len(word) for cell in column for word in cell.split()), default=0)
        least.append(longest if numbers else min(longest, _MOST_OF_A_WORD))
    room = width - _BETWEEN_COLUMNS * (len(columns) - 1) - sum(least)
    if room < 0:
        return None
    widths = list(least)
    # Those that lack least come first, so that as many as can be need one line.
    order = sorted(range(len(columns)), key=lambda index: wanted[index] - least[index])
    for position, index in enumerate(order):
        given = min(wanted[index] - least[index], room // (len(order) - position))
        widths[index] += given
        room -= given
    return widths


def _print_records(console: Console, names: Sequence[str], cells: Sequence[Sequence[str]]) -> None:
    for row in cells:
        for index, (name, cell) in enumerate(zip(names, row, strict=True)):
            start = "" if index == 0 else "  "
            text = f"{start}{' '.join(name.split())}: {' '.join(cell.split())}" if name else f"{start}{cell}"
            for part in _broken(text, console.width):
                console.print(escape(part), soft_wrap=True)


def artifacts_of(folder: Folder, tracking_uri: str, run_id: str) -> dict[str, str]:
    """What a person opens next, and where it is; below the working directory as seen from there."""
    names = (REPORT, SUMMARY, IDENTIFY, FINETUNE)
    where = {name: path_shown(f"{folder.url}/{name}") for name in names}
    return where | {"MLflow": _store_shown(tracking_uri), "MLflow run": run_id}


def next_commands(folder: Folder, tracking_uri: str, experiment_id: str, run_id: str) -> dict[str, str]:
    """Commands for what people do with a finished run.

    Args:
        folder: of the run.
        tracking_uri: the MLflow store of the run.
        experiment_id: MLflow's, of the run.
        run_id: MLflow's.
    """
    run = path_shown(folder.url)
    page = f"/#/experiments/{experiment_id}/runs/{run_id}"
    see = (
        f"{tracking_uri.rstrip('/')}{page}"
        if tracking_uri.startswith("http")
        else f"mlflow ui --backend-store-uri {shlex.quote(_store_shown(tracking_uri))}"
    )
    # A repaired model is written to a local folder, wherever the run is.
    out = f"{run.rstrip('/').rpartition('/')[2]}-repaired" if "://" in run else f"{run.rstrip('/')}-repaired"
    return {
        "ask it, before and after": f"moe-ray chat {shlex.quote(run)}",
        "write the repaired model": f"moe-ray merge {shlex.quote(run)} {shlex.quote(out)}",
        "see it in MLflow": see,
    }


def path_shown(url: str) -> str:
    """A local URL as a path, seen from the working directory where it is below it; any other URL as it is."""
    if "://" in url and not url.startswith("file://"):
        return url
    path = Path(url.removeprefix("file://"))
    return str(path.relative_to(Path.cwd())) if path.is_relative_to(Path.cwd()) else str(path)


def _store_shown(uri: str) -> str:
    return f"sqlite:///{path_shown(uri.removeprefix('sqlite:///'))}" if uri.startswith("sqlite:////") else uri
