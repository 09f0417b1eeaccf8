"""Forward passes of like-length rows within a budget of tokens, and what happens to a row that does not fit.

Rows are sorted by length and cut where a forward pass would exceed the budget or would be more than a tenth padding, so
padding stays under a tenth whatever the lengths. A pass that runs out of memory halves the budget and is tried again.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TypeVar

import torch

from moe_ray.errors import InputError, NotFinite
from moe_ray.models.forward_groups import group_by_length
from moe_ray.prompts.quarantine import FORWARD_FAILED, OUT_OF_MEMORY, Rejected

MAX_PADDING = 0.1
"""Share of a forward pass's tokens that may be padding (0 to 1)."""

T = TypeVar("T")

_OF_ONE_ROW = (RuntimeError, IndexError, NotFinite)
"""Errors of a forward pass that may be about one of its rows."""


def padded_tokens(lengths: Sequence[int] | Mapping[int, int], group: Sequence[int]) -> int:
    """Tokens of a forward pass over the rows of `group`, padding included."""
    return len(group) * max(lengths[row] for row in group)


class TokenBudget:
    """How many tokens one forward pass may hold in this process; it shrinks when memory runs out.

    Args:
        tokens: at the beginning.
        max_padding: share of a group's tokens that may be padding where `run` forms the groups (0 to 1); 1 = rows of any
            lengths, for work that does not pad.

    Attributes:
        tokens: padding included.
        halvings: how often memory ran out.
    """

    def __init__(self, tokens: int, *, max_padding: float = MAX_PADDING) -> None:
        self.tokens, self.halvings, self._max_padding = tokens, 0, max_padding

    def run(self, lengths: Sequence[int], work: Callable[[list[int]], T]) -> Iterator[tuple[list[int], T | Rejected]]:
        """Does `work` on all rows that it can be done on, a group at a time.

        Args:
            lengths: tokens of each row.
            work: one forward pass over the rows of a group.

        Yields:
            a group with what `work` returned, or a single row with why it cannot be done. A group that runs out of
            memory is cut smaller, and so are all groups after it; one that fails in another way is tried row by row.
        """
        return self._run(lengths, work, self._max_padding, _OF_ONE_ROW)

    def run_all(
        self, lengths: Sequence[int], work: Callable[[list[int]], T], *, max_padding: float = MAX_PADDING
    ) -> Iterator[tuple[list[int], T]]:
        """Does `work` on all rows, a group at a time; where memory runs out as `run`, and any other error is raised.

        Args:
            lengths: tokens of each row.
            work: one forward pass over the rows of a group, or as many as give a token each.
            max_padding: share of a group's tokens that may be padding (0 to 1).

        Yields:
            a group with what `work` returned.

        Raises:
            InputError: a row does not fit in memory though it is alone.
        """
        for group, outcome in self._run(lengths, work, max_padding, ()):
            if isinstance(outcome, Rejected):
                raise InputError(
                    f"a row of {lengths[group[0]]} tokens does not fit in memory: {outcome.detail}; shorten the prompt or "
                    "the answer, or give the process more memory"
                )
            yield group, outcome

    def _run(
        self,
        lengths: Sequence[int],
        work: Callable[[list[int]], T],
        max_padding: float,
        of_one_row: tuple[type[Exception], ...],
    ) -> Iterator[tuple[list[int], T | Rejected]]:
        waiting = self._groups(lengths, max_padding)
        while waiting:
            group = waiting.pop(0)
            outcome = _attempt(work, group, of_one_row)
            if not isinstance(outcome, Rejected) or len(group) == 1:
                yield group, outcome
            elif outcome.reason == OUT_OF_MEMORY:
                self.tokens = max(1, min(self.tokens, padded_tokens(lengths, group)) // 2)
                self.halvings += 1
                rest = [row for rows in (group, *waiting) for row in rows]
                smaller = self._groups([lengths[row] for row in rest], max_padding)
                waiting = [[rest[position] for position in rows] for rows in smaller]
            else:
                waiting = [*([row] for row in group), *waiting]

    def _groups(self, lengths: Sequence[int], max_padding: float) -> list[list[int]]:
        return group_by_length(lengths, max_tokens=self.tokens, max_padding=max_padding)


def _attempt(work: Callable[[list[int]], T], group: list[int], of_one_row: tuple[type[Exception], ...]) -> T | Rejected:
    try:
        return work(group)
    except torch.OutOfMemoryError as error:
        rejected = Rejected(OUT_OF_MEMORY, f"a forward pass over it alone runs out of memory: {_first_line(error)}")
    except of_one_row as error:
        if torch.cuda.is_available() and isinstance(error, torch.AcceleratorError):
            raise  # Nothing runs on this device in this process any more.
        rejected = Rejected(FORWARD_FAILED, f"{type(error).__name__}: {_first_line(error)}")
    # Only here, where the error and with it the frames that hold tensors are gone, can memory be given back.
    if torch.cuda.is_available():
        gc.collect()
        torch.cuda.empty_cache()
    return rejected


def _first_line(error: Exception) -> str:
    return (str(error).strip().split("\n")[0] or type(error).__name__)[:200]
