"""`moe-ray prompts`: what is in files of prompts, which published form each is of, and what a run would make of them."""

from __future__ import annotations

import argparse
from collections import Counter

from moe_ray.config.run import Config
from moe_ray.errors import InputError
from moe_ray.prompts.prompt_set import group_examples, read_all
from moe_ray.report.printable import printable

_MOST_CATEGORIES = 40


def run(arguments: argparse.Namespace) -> None:
    """Prints what is in `settings.prompts.files`."""
    print("\n".join(map(printable, lines_of(arguments.settings))))


def lines_of(config: Config) -> list[str]:
    """What is printed: a line for each file, the categories, and the batches that a run would have.

    Raises:
        InputError: a file is missing, unreadable or wrong.
        OutsideFailed: a remote file cannot be read now.
    """
    examples, found = read_all(config)
    lines = [str(table) for table in found]
    counts = Counter((example.category, example.label) for example in examples)
    categories = sorted({category for category, _ in counts}, key=lambda name: (not name, name))
    width = max(len("category"), *(len(name or "(none)") for name in categories))
    lines += ["", f"{'category':<{width}}  {'safe':>7}  {'unsafe':>7}"]
    for name in categories[:_MOST_CATEGORIES]:
        lines.append(f"{name or '(none)':<{width}}  {counts[name, 'safe']:>7}  {counts[name, 'unsafe']:>7}")
    if len(categories) > _MOST_CATEGORIES:
        lines.append(f"… and {len(categories) - _MOST_CATEGORIES} more")
    total = [sum(number for (_, of), number in counts.items() if of == label) for label in ("safe", "unsafe")]
    lines += [f"{'all':<{width}}  {total[0]:>7}  {total[1]:>7}", ""]
    try:
        prompts = group_examples(examples, config)
    except InputError as error:
        return [*lines, f"a run on these alone would be refused: {error}"]
    settings = config.prompts
    lines.append(
        f"{len(prompts.batches)} batches of {settings.safe_per_batch} safe and {settings.unsafe_per_batch} unsafe examples, "
        f"{len(prompts.assembly.left_over)} left over; held out: {len(prompts.test)} for tests, "
        f"{len(prompts.validation)} for validation"
    )
    return lines
