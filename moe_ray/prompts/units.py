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
        of_members = chosen[self.members]
        if len(self) == len(self.members):
            return of_members.astype(np.int32)
        so_far = np.zeros(len(of_members) + 1, dtype=np.int32)
        np.cumsum(of_members, out=so_far[1:])
        counts: npt.NDArray[np.int32] = np.diff(so_far[self.starts])
        return counts


def units_of(index: ExampleIndex) -> Units:
    """The examples, in the groups that must stay together."""
    leader = np.arange(len(index), dtype=np.int32)
    paired = np.flatnonzero(index.pair != NONE).astype(np.int32)
    if not len(paired):
        return Units(members=leader, starts=np.arange(len(index) + 1, dtype=np.int32))
    leader[paired] = paired[_first_of_same(index.pair[paired])]
    members = np.argsort(leader, kind="stable").astype(np.int32)
    begins = _begins(leader[members])
    return Units(members=members, starts=np.append(begins, np.int32(len(members))))


def shuffled(number: int, seed: str) -> npt.NDArray[np.int32]:
    """The numbers from 0, in the order that `random.Random(seed)` gives a list of that length."""
    order = array("i", range(number))
    random.Random(seed).shuffle(order)
    return np.frombuffer(order, dtype=np.int32)


def grouped(keys: npt.NDArray[np.integer[Any]]) -> list[tuple[int, npt.NDArray[np.int32]]]:
    """Each key with the positions that it stands at, the keys in the order of their first positions."""
    by_key = np.argsort(keys, kind="stable").astype(np.int32)
    groups = np.split(by_key, _begins(keys[by_key])[1:]) if len(keys) else []
    return sorted(((int(keys[group[0]]), group) for group in groups), key=lambda item: int(item[1][0]))


def _first_of_same(keys: npt.NDArray[np.integer[Any]]) -> npt.NDArray[np.int32]:
    """For each key the first position that it stands at."""
    by_key = np.argsort(keys, kind="stable").astype(np.int32)
    begins = _begins(keys[by_key])
    first = np.empty(len(keys), dtype=np.int32)
    first[by_key] = np.repeat(by_key[begins], np.diff(begins, append=np.int32(len(keys))))
    return first


def _begins(ordered: npt.NDArray[np.integer[Any]]) -> npt.NDArray[np.int32]:
    """Where in an ordered array another value begins."""
    is_new = np.ones(len(ordered), dtype=np.bool_)
    np.not_equal(ordered[1:], ordered[:-1], out=is_new[1:])
    return np.flatnonzero(is_new).astype(np.int32)
