"""Which rows share a forward pass: those of like length, so that little of a pass is spent on padding."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

GroupContext = Callable[[Sequence[int]], AbstractContextManager[Any]]
"""From the rows of a group to what their forward passes run in, such as the rows' masks."""


def as_it_is(group: Sequence[int]) -> AbstractContextManager[Any]:
    """The group context that changes nothing."""
    return nullcontext()


def group_by_length(
    lengths: Sequence[int], *, max_rows: int = 0, max_tokens: int = 0, max_padding: float = 1.0
) -> list[list[int]]:
    """Groups of rows, each for one forward pass; the longest rows first.

    A pass that does not fit in memory is thus met at once and not at the end.

    Args:
        lengths: tokens of each row.
        max_rows: at most this many rows in a group; 0 = no limit.
        max_tokens: rows x longest row of a group is at most this, but a longer row is alone; 0 = no limit.
        max_padding: share of a group's tokens that may be padding (0 to 1).

    Returns:
        indices into `lengths`, each in exactly one group; rows of one length keep their order.
    """
    rows_limit, tokens_limit = max_rows or math.inf, max_tokens or math.inf
    groups: list[list[int]] = []
    tokens = 0  # of the last group, without padding
    for row in sorted(range(len(lengths)), key=lambda index: -lengths[index]):
        if groups and len(groups[-1]) < rows_limit:
            # Rows come longest first, so a group is as wide as its first row.
            padded = (len(groups[-1]) + 1) * lengths[groups[-1][0]]
            if padded <= tokens_limit and padded - tokens - lengths[row] <= max_padding * padded:
                groups[-1].append(row)
                tokens += lengths[row]
                continue
        groups.append([row])
        tokens = lengths[row]
    return groups
