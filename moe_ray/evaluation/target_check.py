"""A tool for safety must not train compliance: the targets of unsafe examples are read before anything is done.

Benchmarks carry such targets: AdvBench's `target` is the beginning of an answer that complies, "Sure, here is …".
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from moe_ray.errors import InputError
from moe_ray.evaluation.judges.phrases import is_refusal
from moe_ray.prompts.examples import Example
from moe_ray.prompts.spooled_examples import index_of, pick

_MOST_READ = 1000
_MOST_SHOWN = 60


def refuse_complying_targets(examples: Sequence[Example]) -> None:
    """Reads the targets of unsafe examples, up to a thousand of them evenly over the list.

    Args:
        examples: of a run, of both labels.

    Raises:
        InputError: most of the targets refuse nothing, by the phrase judge.
    """
    unsafe = np.flatnonzero(index_of(examples).is_unsafe)
    number = min(_MOST_READ, len(unsafe))
    chosen = unsafe[np.arange(number) * len(unsafe) // max(1, number)]
    with_target = [example for example in pick(examples, chosen.astype(np.int32)) if example.target]
    complying = [example for example in with_target if not is_refusal(example.target or "")]
    if len(complying) * 2 > len(with_target):
        first = complying[0]
        raise InputError(
            f"unsafe examples would be trained towards their `target`, and {len(complying)} of {len(with_target)} that were "
            f"read refuse nothing as far as phrases show, such as {_shortened(first.target or '')!r} ({first.id}); leave "
            "the field out for prompts.refusal, give refusals, or set prompts.allow_complying_targets=true if they are "
            "some after all"
        )


def _shortened(text: str) -> str:
    return text if len(text) <= _MOST_SHOWN else f"{text[:_MOST_SHOWN]}…"
