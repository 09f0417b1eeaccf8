"""Which examples are trained on, watched and held out; the forms of one request stay together."""

from __future__ import annotations

import random
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, replace

from moe_ray.errors import InputError
from moe_ray.prompts.examples import Example, Label, Split


@dataclass(frozen=True, kw_only=True)
class Unit:
    """What must stay together: one example, or the examples of a pair."""

    examples: tuple[Example, ...]

    def count(self, label: Label) -> int:
        """Examples with this label."""
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
    for_training, for_test = _hold_out(unsplit, test_fraction, f"{seed}")
    splits["train"] += [replace(example, split="train") for example in for_training]
    splits["test"] += [replace(example, split="test") for example in for_test]
    if validation_fraction and not splits["validation"]:
        splits["train"], held_out = _hold_out(splits["train"], validation_fraction, f"{seed}/validation")
        splits["validation"] = [replace(example, split="validation") for example in held_out]
    return splits


def _hold_out(examples: Sequence[Example], fraction: float, seed: str) -> tuple[list[Example], list[Example]]:
    """What stays and what is held out: the same share of every label and category, at least one unit of two."""
    groups: dict[tuple[str, str], list[Unit]] = defaultdict(list)
    for unit in units_of(examples):
        first = unit.examples[0]
        groups[first.label if first.pair is None else "pair", first.category].append(unit)
    remaining: list[Example] = []
    held_out: list[Example] = []
    for key in sorted(groups):
        units = groups[key]
        random.Random(f"{seed}/{key}").shuffle(units)
        num_held_out = max(round(len(units) * fraction), int(len(units) > 1))
        for position, unit in enumerate(units):
            (held_out if position < num_held_out else remaining).extend(unit.examples)
    return remaining, held_out


def units_of(examples: Sequence[Example]) -> list[Unit]:
    """The examples, in the groups that must stay together."""
    groups: dict[str, list[Example]] = defaultdict(list)
    for example in examples:
        groups[f"pair {example.pair}" if example.pair is not None else f"single {example.id}"].append(example)
    return [Unit(examples=tuple(group)) for group in groups.values()]
