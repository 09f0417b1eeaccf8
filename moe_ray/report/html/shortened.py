"""What keeps a page small: some of many items, the first of many rows, the beginning of a long text."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeVar

from moe_ray.report.printable import printable_lines

Item = TypeVar("Item")

_MOST_ROWS, _LONGEST_TEXT = 200, 1200


def spread_evenly(items: Sequence[Item], limit: int) -> list[Item]:
    """At most `limit` items, taken evenly over the list."""
    if len(items) <= limit:
        return list(items)
    return [items[index * len(items) // limit] for index in range(limit)]


def first_rows(rows: Sequence[Any]) -> dict[str, Any]:
    """The `rows` of a table that are shown, and how many are `left_out`."""
    return {"rows": list(rows[:_MOST_ROWS]), "left_out": max(0, len(rows) - _MOST_ROWS)}


def shortened_text(text: str) -> str:
    """Untrusted text without control characters other than line ends, cut after 1,200 characters."""
    clean = printable_lines(text)
    return clean if len(clean) <= _LONGEST_TEXT else clean[:_LONGEST_TEXT] + " …"
