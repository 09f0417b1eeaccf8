"""Batches: fixed groups of examples that are analysed together and trained together.

`batch_idx` and `in_batch_idx` are an example's stable ids, never reassigned when batches or examples are dropped.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any, overload

import numpy as np
import numpy.typing as npt
import pandas as pd

from moe_ray.errors import InputError
from moe_ray.prompts.batch_filling import fill_batches
from moe_ray.prompts.example_rows import example_to_row
from moe_ray.prompts.examples import Example
from moe_ray.prompts.spooled_examples import SpooledExamples, index_of, pick

MIXED = "mixed"


@dataclass(frozen=True, kw_only=True)
class Batch:
    """A group of examples.

    Attributes:
        batch_idx: stable id, never reassigned when batches are dropped.
        category: the one category of its unsafe examples, or `mixed`.
        examples: in order of `in_batch_idx`.
    """

    batch_idx: int
    category: str
    examples: tuple[Example, ...]

    def __repr__(self) -> str:
        num_unsafe = sum(example.label == "unsafe" for example in self.examples)
        return f"Batch({self.batch_idx}, {self.category}, {len(self.examples) - num_unsafe} safe + {num_unsafe} unsafe)"

    def to_rows(self) -> list[dict[str, Any]]:
        """One flat row per example: `batch_idx, in_batch_idx, id, label, category, messages` (JSON text), `response`, …."""
        return [
            {"batch_idx": self.batch_idx, "in_batch_idx": position, **example_to_row(example)}
            for position, example in enumerate(self.examples)
        ]

    def to_frame(self) -> pd.DataFrame:
        """The rows of `to_rows` as a table."""
        return pd.DataFrame.from_records(self.to_rows())


class EqualBatches(Sequence[Batch]):
    """Batches of equal size, each made when it is asked for.

    Args:
        examples: of all batches, one batch after the other.
        batch_idx: per batch.
        categories: per batch.
    """

    def __init__(
        self, examples: Sequence[Example], batch_idx: npt.NDArray[np.int64], categories: Sequence[str]
    ) -> None:
        self.examples, self.batch_idx, self.categories = examples, batch_idx, categories
        self.size = len(examples) // len(batch_idx)

    def __repr__(self) -> str:
        return f"EqualBatches({len(self)} batches of {self.size} examples)"

    def __len__(self) -> int:
        return len(self.batch_idx)

    @overload
    def __getitem__(self, item: int) -> Batch: ...
    @overload
    def __getitem__(self, item: slice) -> tuple[Batch, ...]: ...
    def __getitem__(self, item: int | slice) -> Batch | tuple[Batch, ...]:
        if isinstance(item, slice):
            return tuple(self[number] for number in range(*item.indices(len(self))))
        number = range(len(self))[item]
        return self._batch(number, tuple(self.examples[number * self.size : (number + 1) * self.size]))

    def __iter__(self) -> Iterator[Batch]:
        examples = iter(self.examples)
        for number in range(len(self)):
            yield self._batch(number, tuple(islice(examples, self.size)))

    def _batch(self, number: int, examples: tuple[Example, ...]) -> Batch:
        return Batch(batch_idx=int(self.batch_idx[number]), category=self.categories[number], examples=examples)


@dataclass(frozen=True, kw_only=True)
class Assembly:
    """Batches and the examples that filled none."""

    batches: Sequence[Batch]
    left_over: Sequence[Example]

    def __repr__(self) -> str:
        return f"Assembly({len(self.batches)} batches, {len(self.left_over)} examples left over)"


def assemble_batches(
    examples: Sequence[Example],
    *,
    safe_per_batch: int = 8,
    unsafe_per_batch: int = 8,
    by_category: bool = True,
    max_batches: int = 0,
    seed: int = 0,
) -> Assembly:
    """Groups examples into batches of fixed make-up.

    Each batch holds exactly `safe_per_batch` safe and `unsafe_per_batch` unsafe examples, the unsafe ones of one
    category where they have categories. Safe examples of the same category come first; where safe examples carry no
    category, they are shared out among all. Pairs stay whole.

    Args:
        examples: to train on.
        safe_per_batch: at least 1.
        unsafe_per_batch: at least 1.
        by_category: whether a batch is of one category.
        max_batches: most batches, taken evenly over all that could be filled so that categories stay represented; 0 = all.
        seed: of the examples' order.

    Raises:
        InputError: a label is missing, or there are too few examples for a single batch.
    """
    if min(safe_per_batch, unsafe_per_batch) < 1:
        raise InputError(
            f"a batch of {safe_per_batch} safe and {unsafe_per_batch} unsafe examples: expected at least 1 of each label"
        )
    index = index_of(examples)
    index.check_both_labels("training prompts")
    filled = fill_batches(
        index, safe_per_batch=safe_per_batch, unsafe_per_batch=unsafe_per_batch, by_category=by_category, seed=seed
    )
    total = len(filled.categories)
    if not total:
        raise InputError(
            f"no batch could be filled from {len(examples)} training examples: expected {safe_per_batch} safe and "
            f"{unsafe_per_batch} unsafe of one category; lower prompts.safe_per_batch and prompts.unsafe_per_batch, or "
            "set prompts.by_category=false"
        )
    batch_idx, left_over = np.arange(total), filled.left_over
    if max_batches and max_batches < total:
        batch_idx = np.arange(max_batches) * total // max_batches
        left_over = np.concatenate([left_over, np.delete(filled.positions, batch_idx, axis=0).ravel()])
    chosen = pick(examples, filled.positions[batch_idx].ravel())
    categories = [filled.categories[number] or MIXED for number in batch_idx.tolist()]
    batches: Sequence[Batch] = EqualBatches(chosen, batch_idx, categories)
    # What is in memory anyway is handed out as plain tuples.
    batches = batches if isinstance(chosen, SpooledExamples) else tuple(batches)
    return Assembly(batches=batches, left_over=pick(examples, left_over))
