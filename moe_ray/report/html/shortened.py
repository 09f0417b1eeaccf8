"""What keeps a page small: some of many items, the first of many rows, the beginning of a long text."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeVar

from moe_ray.report.printable import printable_lines

Item = TypeVar("Item")

LONGEST_TEXT = 1200
"""Characters of an untrusted text that are shown."""
_MOST_ROWS = 200


def spread_evenly(items: Sequence[Item], limit: int) -> list[Item]:
    """At most `limit` items, taken evenly over the list."""
    if len(items) <= limit:
        return list(items)
    return [items[index * len(items) // limit] for index in range(limit)]


def shown_rows(rows: Sequence[Item], most: int) -> tuple[list[Item], int]:
    """The first `most` rows, and how many are left out."""
    return list(rows[:most]), max(0, len(rows) - most)


def first_rows(rows: Sequence[Any]) -> dict[str, Any]:
    """The `rows` of a table that are shown, and how many are `left_out`."""
    shown, left_out = shown_rows(rows, _MOST_ROWS)
    return {"rows": shown, "left_out": left_out}


def shortened_text(text: str, most: int = LONGEST_TEXT) -> str:
    """Untrusted text without control characters other than line ends, cut after `most` characters."""
    clean = printable_lines(text)
    return clean if len(clean) <= most else clean[:most] + " …"
