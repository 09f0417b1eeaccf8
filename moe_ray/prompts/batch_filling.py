"""Which examples fill which batch, found in one pass over their index.

A batch is filled from its category's units in their shuffled order: each unit that still fits is taken. A unit that did
not fit once does not fit later, since what is missing only becomes less. So the next unit is the first of those whose
make-up fits, and with a queue for each make-up no unit is looked at twice.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from moe_ray.prompts.example_index import ExampleIndex, Positions
from moe_ray.prompts.units import grouped, shuffled, units_of


@dataclass(frozen=True, kw_only=True, eq=False)
class Filling:
    """Batches as positions of examples.

    Attributes:
        positions: (batches, examples of a batch) safe ones first.
        categories: per batch the name of its category; empty for none.
        left_over: the examples that filled no batch.
    """

    positions: Positions
    categories: Sequence[str]
    left_over: Positions


def fill_batches(
    index: ExampleIndex, *, safe_per_batch: int, unsafe_per_batch: int, by_category: bool, seed: int
) -> Filling:
    """Fills as many batches as there are examples for, category after category by name.

    Args:
        index: of the training examples.
        safe_per_batch: at least 1.
        unsafe_per_batch: at least 1.
        by_category: whether a batch has the units of one category only, and safe ones without a category.
        seed: of the units' order.
    """
    units = units_of(index)
    num_unsafe = units.count(index.is_unsafe)
    num_safe = np.diff(units.starts) - num_unsafe
    of_unit = index.category[units.first] if by_category else np.zeros(len(units), dtype=np.int32)
    pools: dict[str, _Pool] = {}
    for category, members in grouped(of_unit):
        name = index.categories[category] if by_category else ""
        ordered = members[shuffled(len(members), f"{seed}/{name}")]
        pools[name] = _Pool(ordered, num_safe[ordered], num_unsafe[ordered], (safe_per_batch, unsafe_per_batch))
    taken, categories = array("i"), []
    for name in sorted(pools):
        others = [pools[""]] if name and "" in pools else []
        while (chosen := _take(pools[name], others, safe_per_batch, unsafe_per_batch)) is not None:
            taken.extend(chosen)
            categories.append(name)
    taken_units = np.frombuffer(taken, dtype=np.int32)
    of_batches = units.of(taken_units).reshape(-1, safe_per_batch + unsafe_per_batch)
    return Filling(
        positions=_safe_first(of_batches, index),
        categories=categories,
        left_over=np.concatenate([units.of(pool.left_over()) for pool in pools.values()]),
    )


def _safe_first(examples: Positions, index: ExampleIndex) -> Positions:
    """(batches, examples of a batch) the same examples, the safe ones of each batch first."""
    return np.take_along_axis(examples, np.argsort(index.is_unsafe[examples], axis=1, kind="stable"), axis=1)


class _Pool:
    """The units of one category, in their order, those of one make-up in a queue.

    Args:
        units: in order.
        num_safe: per unit.
        num_unsafe: per unit.
        most: of safe and of unsafe examples that a unit can have to fit into a batch at all.
    """

    def __init__(
        self,
        units: npt.NDArray[np.int32],
        num_safe: npt.NDArray[np.int32],
        num_unsafe: npt.NDArray[np.int32],
        most: tuple[int, int],
    ) -> None:
        self.units = units
        makeup = num_safe.astype(np.int64) * (int(num_unsafe.max(initial=0)) + 1) + num_unsafe
        self.queues: list[tuple[int, int, array[int]]] = []
        for _, ranks in grouped(makeup):
            counts = int(num_safe[ranks[0]]), int(num_unsafe[ranks[0]])
            if counts[0] <= most[0] and counts[1] <= most[1]:
                self.queues.append((*counts, array("i", ranks.astype(np.int32).tobytes())))
        self.heads = [0] * len(self.queues)
        """Of each queue, how many of its units are gone."""

    def left_over(self) -> npt.NDArray[np.int32]:
        """The units that are not gone, in their order."""
        is_left = np.ones(len(self.units), dtype=np.bool_)
        for (_, _, queue), head in zip(self.queues, self.heads, strict=True):
            is_left[np.frombuffer(queue, dtype=np.int32)[:head]] = False
        return self.units[is_left]


def _take(pool: _Pool, others: Sequence[_Pool], safe: int, unsafe: int) -> list[int] | None:
    """Removes one batch's units from the pools; None, with nothing removed, when they cannot fill it.

    Args:
        pool: of the batch's category.
        others: pools whose safe units may be taken as well. An unsafe example without a category would make the batch
            one of two topics.
        safe: examples that are wanted.
        unsafe: the same.
    """
    before = [list(each.heads) for each in (pool, *others)]
    chosen: list[int] = []
    for each in (pool, *others):
        queues, heads, units = each.queues, each.heads, each.units
        while safe or unsafe:
            first, found = len(units), -1
            for number, (of_safe, of_unsafe, queue) in enumerate(queues):
                head = heads[number]
                if of_safe <= safe and of_unsafe <= unsafe and head < len(queue) and queue[head] < first:
                    if of_unsafe and each is not pool:
                        continue
                    first, found = queue[head], number
            if found < 0:
                break
            heads[found] += 1
            safe, unsafe = safe - queues[found][0], unsafe - queues[found][1]
            chosen.append(int(units[first]))
    if safe or unsafe:
        for each, heads in zip((pool, *others), before, strict=True):
            each.heads = heads
        return None
    return chosen
