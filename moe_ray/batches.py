"""Batches: fixed groups of examples that are analysed together and trained together.

`batch_idx` and `in_batch_idx` name an example for the rest of the run, so a batch that is dropped later shifts nothing.
"""

from __future__ import annotations

import json
import random
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, cast

import pandas as pd

from moe_ray.errors import InputError
from moe_ray.examples import Example, Label, Split

MIXED = "mixed"


@dataclass(frozen=True, kw_only=True)
class Batch:
    """A group of examples.

    Attributes:
        batch_idx: the batch's name for ever.
        category: the one category of its unsafe examples, or `mixed`.
        examples: in order of `in_batch_idx`.
    """

    batch_idx: int
    category: str
    examples: tuple[Example, ...]


@dataclass(frozen=True, kw_only=True)
class Assembly:
    """Batches and the examples that filled none."""

    batches: tuple[Batch, ...]
    left_over: tuple[Example, ...]


@dataclass(frozen=True, kw_only=True)
class _Unit:
    """What must stay together: one example, or the examples of a pair."""

    examples: tuple[Example, ...]

    def count(self, label: Label) -> int:
        return sum(example.label == label for example in self.examples)


def check_both_labels(examples: Sequence[Example], what: str) -> None:
    """Refuses a set of examples that lacks a label.

    Raises:
        InputError: there is no safe or no unsafe example.
    """
    counts = {label: sum(example.label == label for example in examples) for label in ("safe", "unsafe")}
    if not all(counts.values()):
        raise InputError(
            f"{what}: got {counts['safe']} safe and {counts['unsafe']} unsafe examples, expected both labels; "
            "add prompts of the missing label to prompts.files"
        )


def split_examples(
    examples: Sequence[Example], *, test_fraction: float, validation_fraction: float = 0.0, seed: int
) -> dict[Split, list[Example]]:
    """Examples by split: as their files say, or else held out at random with pairs and labels kept balanced.

    Args:
        examples: any.
        test_fraction: share of the examples without a split that goes to `test` (0 to 1).
        validation_fraction: share of the training examples that goes to `validation` where no file names that split
            (0 to 1).
        seed: of the draw.

    Returns:
        `train`, `validation` and `test`.
    """
    splits: dict[Split, list[Example]] = {"train": [], "validation": [], "test": []}
    unsplit = [example for example in examples if example.split is None]
    for example in examples:
        if example.split is not None:
            splits[example.split].append(example)
    kept, for_test = _hold_out(unsplit, test_fraction, f"{seed}")
    splits["train"] += [replace(example, split="train") for example in kept]
    splits["test"] += [replace(example, split="test") for example in for_test]
    if validation_fraction and not splits["validation"]:
        splits["train"], held_out = _hold_out(splits["train"], validation_fraction, f"{seed}/validation")
        splits["validation"] = [replace(example, split="validation") for example in held_out]
    return splits


def _hold_out(examples: Sequence[Example], fraction: float, seed: str) -> tuple[list[Example], list[Example]]:
    """What stays and what is held out: the same share of every label and category, at least one unit of two."""
    groups: dict[tuple[str, str], list[_Unit]] = defaultdict(list)
    for unit in _units(examples):
        first = unit.examples[0]
        groups[first.label if first.pair is None else "pair", first.category].append(unit)
    kept: list[Example] = []
    held_out: list[Example] = []
    for key in sorted(groups):
        units = groups[key]
        random.Random(f"{seed}/{key}").shuffle(units)
        num_held_out = max(round(len(units) * fraction), int(len(units) > 1))
        for position, unit in enumerate(units):
            (held_out if position < num_held_out else kept).extend(unit.examples)
    return kept, held_out


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
    pools: dict[str, list[_Unit]] = defaultdict(list)
    for unit in _units(examples):
        pools[unit.examples[0].category if by_category else ""].append(unit)
    for category in sorted(pools):
        random.Random(f"{seed}/{category}").shuffle(pools[category])
    uncategorised = pools.get("", [])
    batches: list[Batch] = []
    for category in sorted(pools):
        own = pools[category]
        while (chosen := _take(own, uncategorised, safe_per_batch, unsafe_per_batch)) is not None:
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


def _units(examples: Sequence[Example]) -> list[_Unit]:
    groups: dict[str, list[Example]] = defaultdict(list)
    for example in examples:
        groups[f"pair {example.pair}" if example.pair is not None else f"single {example.id}"].append(example)
    return [_Unit(examples=tuple(group)) for group in groups.values()]


def _take(own: list[_Unit], shared: list[_Unit], num_safe: int, num_unsafe: int) -> list[Example] | None:
    """Removes one batch's units from the pools; None, with nothing removed, when they cannot fill it."""
    wanted: dict[Label, int] = {"safe": num_safe, "unsafe": num_unsafe}
    chosen: list[tuple[list[_Unit], _Unit]] = []
    pools = [own] if own is shared else [own, shared]
    for pool in pools:
        for unit in pool:
            if pool is shared and own is not shared and unit.count("unsafe"):
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


def batches_to_frame(batches: Sequence[Batch]) -> pd.DataFrame:
    """One row per example: the form in which batches are stored."""
    return pd.DataFrame.from_records(
        [
            {"batch_idx": batch.batch_idx, "in_batch_idx": position, **example_to_row(example)}
            for batch in batches
            for position, example in enumerate(batch.examples)
        ]
    )


def frame_to_batches(frame: pd.DataFrame) -> list[Batch]:
    """The batches that `batches_to_frame` wrote."""
    batches = []
    for batch_idx, group in frame.groupby("batch_idx", sort=True):
        rows = group.sort_values("in_batch_idx").to_dict("records")
        examples = tuple(row_to_example(cast("dict[str, Any]", row)) for row in rows)
        categories = {example.category for example in examples if example.label == "unsafe"}
        category = categories.pop() if len(categories) == 1 else MIXED
        batches.append(Batch(batch_idx=int(cast(int, batch_idx)), category=category or MIXED, examples=examples))
    return batches


def examples_to_frame(examples: Sequence[Example]) -> pd.DataFrame:
    """One row per example."""
    return pd.DataFrame.from_records([example_to_row(example) for example in examples])


def example_to_row(example: Example) -> dict[str, Any]:
    """An example as a flat row of plain values; messages as JSON text."""
    return {
        "id": example.id,
        "label": example.label,
        "category": example.category,
        "messages": json.dumps([dict(message) for message in example.messages], ensure_ascii=False),
        "response": example.response,
        "target": example.target,
        "target_complete": example.target_complete,
        "pair": example.pair,
        "split": example.split,
    }


def row_to_example(row: Mapping[str, Any]) -> Example:
    """The example that `example_to_row` wrote; missing text may be None or NaN."""

    def text(name: str) -> Any:
        value = row.get(name)
        return value if isinstance(value, str) else None

    return Example(
        id=row["id"],
        label=row["label"],
        category=row["category"],
        messages=tuple(json.loads(row["messages"])),
        response=text("response"),
        target=text("target"),
        target_complete=bool(row["target_complete"]),
        pair=text("pair"),
        split=text("split"),
    )
