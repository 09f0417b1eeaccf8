"""Splits and batches made the plain way, by looking through lists of examples: what the fast way must agree with."""

from __future__ import annotations

import random
from collections import defaultdict
from dataclasses import replace

LABELS = ("safe", "unsafe")


def count(unit, label):
    return sum(example.label == label for example in unit)


def units_of(examples):
    groups = defaultdict(list)
    for example in examples:
        groups[f"pair {example.pair}" if example.pair is not None else f"single {example.id}"].append(example)
    return [tuple(group) for group in groups.values()]


def split_examples(examples, *, test_fraction, validation_fraction, seed):
    splits = {"train": [], "validation": [], "test": []}
    for example in examples:
        if example.split is not None:
            splits[example.split].append(example)
    unsplit = [example for example in examples if example.split is None]
    for_training, for_test = hold_out(unsplit, test_fraction, f"{seed}")
    splits["train"] += [replace(example, split="train") for example in for_training]
    splits["test"] += [replace(example, split="test") for example in for_test]
    if validation_fraction and not splits["validation"]:
        splits["train"], held_out = hold_out(splits["train"], validation_fraction, f"{seed}/validation")
        splits["validation"] = [replace(example, split="validation") for example in held_out]
    return splits


def hold_out(examples, fraction, seed):
    groups = defaultdict(list)
    for unit in units_of(examples):
        groups[unit[0].label if unit[0].pair is None else "pair", unit[0].category].append(unit)
    remaining, held_out = [], []
    for key in sorted(groups):
        units = groups[key]
        random.Random(f"{seed}/{key}").shuffle(units)
        num_held_out = max(round(len(units) * fraction), int(len(units) > 1))
        for position, unit in enumerate(units):
            (held_out if position < num_held_out else remaining).extend(unit)
    return remaining, held_out


def assemble(examples, *, safe_per_batch, unsafe_per_batch, by_category, max_batches, seed):
    """Batches as (index, category, examples), and the examples that are left over."""
    pools = defaultdict(list)
    for unit in units_of(examples):
        pools[unit[0].category if by_category else ""].append(unit)
    for category in sorted(pools):
        random.Random(f"{seed}/{category}").shuffle(pools[category])
    uncategorised = pools.get("", [])
    batches = []
    for category in sorted(pools):
        while (chosen := take(pools[category], uncategorised, safe_per_batch, unsafe_per_batch)) is not None:
            group = tuple(sorted(chosen, key=lambda example: example.label))
            batches.append((len(batches), category or "mixed", group))
    left_over = [example for pool in pools.values() for unit in pool for example in unit]
    if max_batches:
        total, limit = len(batches), min(max_batches, len(batches))
        chosen = {position * total // limit for position in range(limit)}
        left_over += [example for number, _, group in batches if number not in chosen for example in group]
        batches = [batch for batch in batches if batch[0] in chosen]
    return batches, left_over


def take(of_category, uncategorised, num_safe, num_unsafe):
    wanted = {"safe": num_safe, "unsafe": num_unsafe}
    chosen = []
    for pool in [of_category] if of_category is uncategorised else [of_category, uncategorised]:
        for unit in pool:
            if pool is not of_category and count(unit, "unsafe"):
                continue
            counts = {label: count(unit, label) for label in LABELS}
            if all(counts[label] <= wanted[label] for label in LABELS):
                chosen.append((pool, unit))
                wanted = {label: wanted[label] - counts[label] for label in LABELS}
            if not any(wanted.values()):
                break
    if any(wanted.values()):
        return None
    for pool, unit in chosen:
        pool.remove(unit)
    return [example for _, unit in chosen for example in unit]
