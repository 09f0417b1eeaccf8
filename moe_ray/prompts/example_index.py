"""What splits and batches are made by: label, category, pair and split of every example, some ten bytes each."""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import get_args

import numpy as np
import numpy.typing as npt

from moe_ray.errors import InputError
from moe_ray.prompts.examples import Example, Split

SPLITS: tuple[Split, ...] = get_args(Split)
NONE = -1
"""The number of a pair or a split that an example does not have."""

Positions = npt.NDArray[np.int32]
"""Positions of examples in a sequence of them."""


@dataclass(frozen=True, kw_only=True, eq=False)
class ExampleIndex:
    """Labels, categories, pairs and splits of examples, in their order.

    Attributes:
        is_unsafe: per example whether its label is `unsafe`.
        category: per example the number of its category.
        categories: names of the categories.
        pair: per example the number of its pair, or `NONE`.
        split: per example the number of its split in `SPLITS`, or `NONE`.
    """

    is_unsafe: npt.NDArray[np.bool_]
    category: npt.NDArray[np.int32]
    categories: Sequence[str]
    pair: npt.NDArray[np.int32]
    split: npt.NDArray[np.int8]

    def __len__(self) -> int:
        return len(self.is_unsafe)

    def take(self, positions: Positions) -> ExampleIndex:
        """The same of some of the examples."""
        return ExampleIndex(
            is_unsafe=self.is_unsafe[positions],
            category=self.category[positions],
            categories=self.categories,
            pair=self.pair[positions],
            split=self.split[positions],
        )

    def check_both_labels(self, what: str) -> None:
        """Refuses a set of examples that lacks a label.

        Raises:
            InputError: there is no safe or no unsafe example.
        """
        num_unsafe = int(self.is_unsafe.sum())
        num_safe = len(self) - num_unsafe
        if not (num_safe and num_unsafe):
            raise InputError(
                f"{what}: got {num_safe} safe and {num_unsafe} unsafe examples, expected both labels; "
                "add prompts of the missing label to prompts.files"
            )


class IndexBuilder:
    """Makes an index of examples that come one group after the other."""

    def __init__(self) -> None:
        self._is_unsafe, self._split = bytearray(), array("b")
        self._category, self._pair = array("i"), array("i")
        self._categories: dict[str, int] = {}
        self._num_pairs = 0

    def add(self, examples: Iterable[Example]) -> None:
        """Adds examples; those of one call that name the same pair are one, and no pair goes on in another call."""
        pairs: dict[str, int] = {}
        for example in examples:
            pair = NONE if example.pair is None else pairs.setdefault(example.pair, self._num_pairs + len(pairs))
            self._is_unsafe.append(example.label == "unsafe")
            self._category.append(self._categories.setdefault(example.category, len(self._categories)))
            self._pair.append(pair)
            self._split.append(NONE if example.split is None else SPLITS.index(example.split))
        self._num_pairs += len(pairs)

    def finish(self) -> ExampleIndex:
        """The index of everything that was added."""
        return ExampleIndex(
            is_unsafe=np.frombuffer(self._is_unsafe, dtype=np.bool_),
            category=np.frombuffer(self._category, dtype=np.int32),
            categories=tuple(self._categories),
            pair=np.frombuffer(self._pair, dtype=np.int32),
            split=np.frombuffer(self._split, dtype=np.int8),
        )
