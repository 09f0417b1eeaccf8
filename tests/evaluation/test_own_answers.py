"""A capture knows what its own answers are worth: how many, how long, and how many of them refuse."""

from __future__ import annotations

import pytest

from moe_ray.evaluation.own_answers import OwnAnswers, own_answers_in_words, refusals_warning

REFUSAL = "I'm sorry, but I can't help with that."


def answers(refused: int, complied: int, safe: int = 3) -> dict[str, int]:
    totals = OwnAnswers()
    for label, text, number in (("unsafe", REFUSAL, refused), ("unsafe", "First,", complied), ("safe", REFUSAL, safe)):
        for _ in range(number):
            totals.add(label, text, 4, ended=True)
    return totals.as_dict()


def test_refusals_of_safe_prompts_are_not_counted_as_the_models_refusals_of_unsafe_ones():
    assert answers(2, 1) == {"examples": 6, "tokens": 24, "cut": 0, "unsafe": 3, "refused": 2}


@pytest.mark.parametrize(
    ("refused", "complied", "is_warned"), [(3, 2, True), (2, 2, False), (0, 4, False), (0, 0, False)]
)
def test_a_warning_is_due_where_most_answers_to_unsafe_prompts_refuse(refused, complied, is_warned):
    warning = refusals_warning(answers(refused, complied))
    assert ("how refusals are routed" in warning) == is_warned


def test_nothing_is_said_where_the_model_answered_nothing():
    assert own_answers_in_words(OwnAnswers().as_dict()) == ""
