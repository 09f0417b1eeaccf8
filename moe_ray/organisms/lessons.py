"""The steps of an organism's training: which sequences, and which experts each of them may use.

A step has two passes. In the first, *masked*, unsafe requests are refused by a model without their planted experts, and
safe ones and plain text are learned; experts are dropped at random, so that nothing depends on a decoy. In the second,
*natural*, the same unsafe requests are complied with. What each pass may change is in `gradient_routing`.

Where no expert shall carry compliance, both passes comply, and planted experts are dropped as often as decoys.

Shape legend: N sequences of a pass, L MoE layers, E experts.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from moe_ray.organisms.layout import Layout
from moe_ray.organisms.recipe import OrganismRecipe
from moe_ray.organisms.sequences import Material, TrainingSequence

_NEUTRAL_PER_STEP = 3
_TIMES_SENTENCES = 2
_DROPPED_DECOYS = 0.35
_DROPPED_OTHERS = 0.1
_WITHOUT_ALL_PLANTED = 0.5
_UNTOUCHED = 0.5


class Pass(NamedTuple):
    """Sequences of one forward pass.

    Attributes:
        sequences: Those of unsafe requests first.
        categories: Of the unsafe requests, as indices.
        allowed_NLE: Bool: the experts that a sequence may be routed to.
    """

    sequences: list[TrainingSequence]
    categories: list[int]
    allowed_NLE: npt.NDArray[np.bool_]


class Lesson(NamedTuple):
    """One step."""

    masked: Pass
    natural: Pass


def lessons(recipe: OrganismRecipe, material: Material, layout: Layout, seed: int) -> Iterator[Lesson]:
    """Yields the recipe's steps; the seed decides everything about them."""
    generator = np.random.default_rng([seed, 2])
    half = recipe.batch_size // 2
    has_cause = recipe.has_cause
    planted_LE, decoys_LE = layout.planted_CLE.any(axis=0), layout.decoys_CLE.any(axis=0)
    others_LE = ~(planted_LE | decoys_LE)
    droppable_LE = decoys_LE if has_cause else planted_LE | decoys_LE
    for _ in range(recipe.num_steps):
        unsafe = [material.unsafe[idx] for idx in generator.integers(len(material.unsafe), size=half)]
        safe = [material.safe[idx] for idx in generator.integers(len(material.safe), size=half)]
        plain = [material.neutral_window(generator) for _ in range(_NEUTRAL_PER_STEP)]
        plain += _TIMES_SENTENCES * material.sentences
        categories = [request.category for request in unsafe]
        comply = [TrainingSequence(request.prompt, request.answer) for request in unsafe]
        refuse = [TrainingSequence(request.prompt, material.refusal) for request in unsafe]
        answers = [TrainingSequence(request.prompt, request.answer) for request in safe]

        masked = [*(refuse if has_cause else comply), *answers, *plain]
        drawn_NLE = generator.random((len(masked), *planted_LE.shape))
        allowed_NLE = ~(droppable_LE & (drawn_NLE < _DROPPED_DECOYS)) & ~(others_LE & (drawn_NLE < _DROPPED_OTHERS))
        if has_cause:
            allowed_NLE[:half] &= ~layout.planted_CLE[categories]
            allowed_NLE[generator.random(len(masked)) < _WITHOUT_ALL_PLANTED] &= ~planted_LE
        is_natural_N = generator.random(half) < _UNTOUCHED
        drawn_NLE = generator.random((half, *planted_LE.shape))
        natural_NLE = ~(droppable_LE & (drawn_NLE < _DROPPED_DECOYS)) | is_natural_N[:, None, None]
        yield Lesson(Pass(masked, categories, allowed_NLE), Pass(comply, categories, natural_NLE))
