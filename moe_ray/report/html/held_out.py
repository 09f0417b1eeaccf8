"""The page's part on held-out prompts: figures before and after, overall and by category."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from moe_ray.report.before_after import (
    RATES,
    ROUTINGS,
    WHENS,
    BeforeAfter,
    Block,
    blocks_of,
    category_rows,
    overall_rows,
)
from moe_ray.report.printable import printable
from moe_ray.run_directory import RunDirectory, figures_of


@dataclass(frozen=True, kw_only=True)
class HeldOutTable:
    """A table of the page, with the chart of its rates.

    Attributes:
        title: above it.
        figure: the chart's name.
        rows: what both show.
    """

    title: str
    figure: str
    rows: Sequence[BeforeAfter]

    @property
    def rates(self) -> list[BeforeAfter]:
        """The rows that the chart shows."""
        return [row for row in self.rows if row.is_rate]


@dataclass(frozen=True, kw_only=True)
class HeldOutPart:
    """What was measured under one kind of routing.

    Attributes:
        overall: over all examples.
        by_category: a table per rate; empty where all examples are of one category.
    """

    overall: HeldOutTable
    by_category: Sequence[HeldOutTable]


def held_out_blocks(run: RunDirectory) -> tuple[Block, Block, Block]:
    """The figures of `WHENS`: from the summary, or, where a run has none yet, from the stages that are finished."""
    before, after, change = (_block(run, when) for when in WHENS)
    return before, after, change


def _block(run: RunDirectory, when: str) -> Block:
    if run.summary is not None:
        found: Mapping[str, Any] | None = run.summary.get(when)
        return found
    manifest = run.manifest(figures_of("before" if when == "before" else "after"))
    return None if manifest is None else manifest["notes"].get("change" if when == "change" else "metrics")


def held_out_parts(whens: Sequence[Block]) -> list[HeldOutPart]:
    """A part for every kind of routing that was evaluated.

    Args:
        whens: from `held_out_blocks`.
    """
    parts = []
    for routing, title in ROUTINGS.items():
        blocks = blocks_of(whens, routing)
        rows = overall_rows(blocks)
        if rows:
            overall = HeldOutTable(title=title, figure=f"before_after_{routing}", rows=rows)
            parts.append(HeldOutPart(overall=overall, by_category=_by_category(routing, blocks)))
    return parts


def _by_category(routing: str, blocks: Sequence[Block]) -> list[HeldOutTable]:
    tables = []
    for key, title in RATES.items():
        rows = [replace(row, name=printable(row.name)) for row in category_rows(blocks, key)]
        if rows:
            tables.append(HeldOutTable(title=title, figure=f"{key}_{routing}_by_category", rows=rows))
    return tables
