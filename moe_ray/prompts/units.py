"""Units: what must stay together of examples, one by itself or all those of a pair."""

from __future__ import annotations

import random
from array import array
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from moe_ray.prompts.example_index import NONE, ExampleIndex, Positions


@dataclass(frozen=True, kw_only=True, eq=False)
class Units:
    """The units of examples, in the order of their first examples.

    Attributes:
        members: positions of the examples, those of a unit next to each other and in their order.
        starts: (units + 1,) where in `members` a unit begins.
    """

    members: Positions
    starts: npt.NDArray[np.int32]

    def __len__(self) -> int:
        return len(self.starts) - 1

    @property
    def first(self) -> Positions:
        """Per unit its first example."""
        first: Positions = self.members[self.starts[:-1]]
        return first

    def of(self, units: npt.NDArray[np.int32]) -> Positions:
        """Positions of the examples of these units, unit after unit."""
        if len(self) == len(self.members):
            singles: Positions = self.members[units]
            return singles
        sizes = np.diff(self.starts)[units]
        before = np.cumsum(sizes) - sizes
        inside = np.arange(sizes.sum()) - np.repeat(before, sizes)
        members: Positions = self.members[np.repeat(self.starts[units], sizes) + inside]
        return members

    def count(self, chosen: npt.NDArray[np.bool_]) -> npt.NDArray[np.int32]:
        """Per unit how many of its examples are chosen.

        Args:
            chosen: per example.
        """
        so_far = np.concatenate([[0], np.cumsum(chosen[self.members])])
        counts: npt.NDArray[np.int32] = np.diff(so_far[self.starts]).astype(np.int32)
        return counts


def units_of(index: ExampleIndex) -> Units:
    """The examples, in the groups that must stay together."""
    leader = np.arange(len(index), dtype=np.int32)
    paired = np.flatnonzero(index.pair != NONE).astype(np.int32)
    if len(paired):
        _, firsts, number = np.unique(index.pair[paired], return_index=True, return_inverse=True)
        leader[paired] = paired[firsts][number]
    members = np.argsort(leader, kind="stable").astype(np.int32)
    begins = np.flatnonzero(np.diff(leader[members], prepend=-1))
    return Units(members=members, starts=np.append(begins, len(members)).astype(np.int32))


def shuffled(number: int, seed: str) -> npt.NDArray[np.int32]:
    """The numbers from 0, in the order that `random.Random(seed)` gives a list of that length."""
    order = array("i", range(number))
    random.Random(seed).shuffle(order)
    return np.frombuffer(order, dtype=np.int32)


def grouped(keys: npt.NDArray[np.integer[Any]]) -> list[tuple[int, npt.NDArray[np.int32]]]:
    """Each key with the positions that it stands at, the keys in the order of their first positions."""
    if not len(keys):
        return []
    by_key = np.argsort(keys, kind="stable").astype(np.int32)
    begins = np.flatnonzero(np.diff(keys[by_key], prepend=keys[by_key[0]] - 1))
    groups = np.split(by_key, begins[1:])
    return sorted(((int(keys[group[0]]), group) for group in groups), key=lambda item: int(item[1][0]))
