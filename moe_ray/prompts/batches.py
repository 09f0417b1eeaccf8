"""Batches: fixed groups of examples that are analysed together and trained together.

`batch_idx` and `in_batch_idx` are an example's stable ids, never reassigned when batches or examples are dropped.
"""

from __future__ import annotations

import random
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import pandas as pd

from moe_ray.errors import InputError
from moe_ray.prompts.example_rows import example_to_row
from moe_ray.prompts.examples import Example, Label
from moe_ray.prompts.splits import Unit, check_both_labels, units_of

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


@dataclass(frozen=True, kw_only=True)
class Assembly:
    """Batches and the examples that filled none."""

    batches: tuple[Batch, ...]
    left_over: tuple[Example, ...]

    def __repr__(self) -> str:
        return f"Assembly({len(self.batches)} batches, {len(self.left_over)} examples left over)"


def assemble_batches(
    examples: Sequence[Example],
    *,
    safe_per_batch: int = 8,
    unsafe_per_batch: int = 8,
    by_category: bool = True,
    seed: int = 0,
) -> Assembly:
    """Groups examples into batches of fixed make-up.

    Each batch holds exactly `safe_per_batch` safe and `unsafe_per_batch` unsafe examples, the unsafe ones of one
    category where they have categories. Safe examples of the same category come first; where safe examples carry no
    category, they are shared out among all. Pairs stay whole.

    Raises:
        InputError: a label is missing, or there are too few examples for a single batch.
    """
    check_both_labels(examples, "training prompts")
    pools: dict[str, list[Unit]] = defaultdict(list)
    for unit in units_of(examples):
        pools[unit.examples[0].category if by_category else ""].append(unit)
    for category in sorted(pools):
        random.Random(f"{seed}/{category}").shuffle(pools[category])
    uncategorised = pools.get("", [])
    batches: list[Batch] = []
    for category in sorted(pools):
        while (chosen := _take(pools[category], uncategorised, safe_per_batch, unsafe_per_batch)) is not None:
            group = tuple(sorted(chosen, key=lambda example: example.label))
            batches.append(Batch(batch_idx=len(batches), category=category or MIXED, examples=group))
    left_over = tuple(example for pool in pools.values() for unit in pool for example in unit.examples)
    if not batches:
        raise InputError(
            f"no batch could be filled from {len(examples)} training examples: expected {safe_per_batch} safe and "
            f"{unsafe_per_batch} unsafe of one category; lower prompts.safe_per_batch and prompts.unsafe_per_batch, or "
            "set prompts.by_category=false"
        )
    return Assembly(batches=tuple(batches), left_over=left_over)


def _take(of_category: list[Unit], uncategorised: list[Unit], num_safe: int, num_unsafe: int) -> list[Example] | None:
    """Removes one batch's units from the pools; None, with nothing removed, when they cannot fill it."""
    wanted: dict[Label, int] = {"safe": num_safe, "unsafe": num_unsafe}
    chosen: list[tuple[list[Unit], Unit]] = []
    pools = [of_category] if of_category is uncategorised else [of_category, uncategorised]
    for pool in pools:
        for unit in pool:
            # An unsafe example without a category would make the batch one of two topics.
            if pool is not of_category and unit.count("unsafe"):
                continue
            counts: dict[Label, int] = {"safe": unit.count("safe"), "unsafe": unit.count("unsafe")}
            if all(counts[label] <= wanted[label] for label in wanted):
                chosen.append((pool, unit))
                wanted = {label: wanted[label] - counts[label] for label in wanted}
            if not any(wanted.values()):
                break
    if any(wanted.values()):
        return None
    for pool, unit in chosen:
        pool.remove(unit)
    return [example for _, unit in chosen for example in unit.examples]
