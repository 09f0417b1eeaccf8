"""Targets are read before anything is done: they must hold an answer, and a tool for safety must not train compliance.

Benchmarks carry targets that comply: AdvBench's `target` is the beginning of an answer, "Sure, here is …".
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence

import numpy as np
import pyarrow.compute as pc

from moe_ray.errors import InputError
from moe_ray.evaluation.judges.phrases import is_refusal
from moe_ray.models.thoughts import ANY_MARK, without_thought
from moe_ray.prompts.examples import Example
from moe_ray.prompts.spooled_examples import SpooledExamples, index_of, pick

_MOST_READ = 1000
_MOST_SHOWN = 60


def refuse_targets_without_answer(examples: Sequence[Example]) -> None:
    """Reads the targets that have marks of a thought in them; a thought is never trained towards, so it cannot be all.

    Args:
        examples: of a run.

    Raises:
        InputError: a target is a thought that does not end, or has nothing after it.
    """
    found = [(name, target) for name, target in _with_marks(examples) if not without_thought(target).strip()]
    if found:
        name, target = found[0]
        raise InputError(
            f"`target` is a thought without an answer in {len(found)} of {len(examples)} examples, such as "
            f"{_shortened(target)!r} ({name}), expected an answer after the mark that closes the thought; give it, or leave "
            "the field out"
        )


def _with_marks(examples: Sequence[Example]) -> Iterator[tuple[str, str]]:
    """Id and target of the examples whose target may have a thought in it."""
    if isinstance(examples, SpooledExamples):
        for table in examples.tables(["id", "target"]):
            marked = table.filter(pc.match_substring_regex(table["target"], ANY_MARK))
            yield from zip(marked["id"].to_pylist(), marked["target"].to_pylist(), strict=True)
    else:
        yield from ((one.id, one.target) for one in examples if one.target and re.search(ANY_MARK, one.target))


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
    complying = [example for example in with_target if not is_refusal(without_thought(example.target or ""))]
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
