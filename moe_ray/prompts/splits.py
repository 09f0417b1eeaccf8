"""Which examples are trained on, watched and held out; the forms of one request stay together."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from moe_ray.prompts.example_index import NONE, SPLITS, ExampleIndex, Positions
from moe_ray.prompts.examples import Example, Split
from moe_ray.prompts.spooled_examples import index_of, pick
from moe_ray.prompts.units import grouped, shuffled, units_of

_KINDS = ("safe", "unsafe", "pair")


def split_examples(
    examples: Sequence[Example], *, test_fraction: float, validation_fraction: float = 0.0, seed: int
) -> dict[Split, Sequence[Example]]:
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
    index = index_of(examples)
    found = {split: np.flatnonzero(index.split == number).astype(np.int32) for number, split in enumerate(SPLITS)}
    unsplit = np.flatnonzero(index.split == NONE).astype(np.int32)
    for_training, for_test = _hold_out(index.take(unsplit), test_fraction, f"{seed}")
    found["train"] = np.concatenate([found["train"], unsplit[for_training]])
    found["test"] = np.concatenate([found["test"], unsplit[for_test]])
    if validation_fraction and not len(found["validation"]):
        remaining, held_out = _hold_out(index.take(found["train"]), validation_fraction, f"{seed}/validation")
        found["train"], found["validation"] = found["train"][remaining], found["train"][held_out]
    return {split: pick(examples, positions, split) for split, positions in found.items()}


def _hold_out(index: ExampleIndex, fraction: float, seed: str) -> tuple[Positions, Positions]:
    """What stays and what is held out: the same share of every label and category, at least one unit of two."""
    units = units_of(index)
    first = units.first
    kind = np.where(index.pair[first] == NONE, index.is_unsafe[first], _KINDS.index("pair"))
    num_categories = max(1, len(index.categories))
    groups = {
        (_KINDS[key // num_categories], index.categories[key % num_categories]): members
        for key, members in grouped(kind.astype(np.int64) * num_categories + index.category[first])
    }
    remaining = [np.empty(0, dtype=np.int32)]
    held_out = [np.empty(0, dtype=np.int32)]
    for group in sorted(groups):
        ordered = groups[group][shuffled(len(groups[group]), f"{seed}/{group}")]
        num_held_out = max(round(len(ordered) * fraction), int(len(ordered) > 1))
        held_out.append(units.of(ordered[:num_held_out]))
        remaining.append(units.of(ordered[num_held_out:]))
    return np.concatenate(remaining), np.concatenate(held_out)
