"""What a step teaches, and which experts its sequences may use."""

import numpy as np
import pytest

from moe_ray.organisms.layout import draw_layout
from moe_ray.organisms.lessons import lessons
from moe_ray.organisms.recipe import OrganismRecipe
from moe_ray.organisms.sequences import Material, Request, TrainingSequence


class FewWords(Material):
    """A handful of sequences in place of all that is trained on."""

    def __init__(self):
        self.unsafe = [Request([1, 2, category], [9], category) for category in range(6)]
        self.safe = [Request([3, 4, category], [8, category], category) for category in range(6)]
        self.refusal = [7]
        self.sentences = [TrainingSequence([7], [7]), TrainingSequence([9], [9])]
        self.paragraphs = [[5] * 50]


def steps(kind, seed=0, num_steps=20):
    recipe = OrganismRecipe(kind=kind, num_steps=num_steps, batch_size=12)
    layout = draw_layout(recipe, 6, seed)
    return layout, list(lessons(recipe, FewWords(), layout, seed))


@pytest.mark.parametrize("kind", ["planted", "late"])
def test_a_refused_request_never_has_the_planted_experts_of_its_category(kind):
    layout, taught = steps(kind)
    for lesson in taught:
        for idx, category in enumerate(lesson.masked.categories):
            assert lesson.masked.sequences[idx].learned == [7]
            assert not (lesson.masked.allowed_NLE[idx] & layout.planted_CLE[category]).any()


@pytest.mark.parametrize("kind", ["planted", "late"])
def test_a_request_that_is_complied_with_always_has_them(kind):
    layout, taught = steps(kind)
    for lesson in taught:
        for idx, category in enumerate(lesson.natural.categories):
            assert lesson.natural.sequences[idx].learned == [9]
            assert lesson.natural.allowed_NLE[idx][layout.planted_CLE[category]].all()


@pytest.mark.parametrize("kind", ["spread", "attention"])
def test_where_no_expert_is_the_cause_nothing_is_refused_and_any_expert_may_be_missing(kind):
    _, taught = steps(kind)
    learned = [sequence.learned for lesson in taught for sequence in lesson.masked.sequences[:6]]
    assert learned == [[9]] * len(learned)
    missing = np.any([~lesson.masked.allowed_NLE.all(axis=0) for lesson in taught], axis=0)
    assert missing.all()


@pytest.mark.parametrize("kind", ["planted", "spread"])
def test_decoys_are_missing_now_and_then_in_both_passes(kind):
    layout, taught = steps(kind)
    for name in ("masked", "natural"):
        allowed = np.concatenate([getattr(lesson, name).allowed_NLE for lesson in taught])
        share = allowed[:, layout.decoys_CLE.any(axis=0)].mean()
        assert 0.5 < share < 0.95


def test_the_seed_decides_every_step():
    (_, first), (_, same), (_, other) = (steps("planted", seed) for seed in (0, 0, 1))
    assert all(np.array_equal(a.masked.allowed_NLE, b.masked.allowed_NLE) for a, b in zip(first, same, strict=True))
    assert [a.masked.sequences for a in first] == [b.masked.sequences for b in same]
    assert [a.masked.sequences for a in first] != [b.masked.sequences for b in other]
