"""What survives a control is said with its numbers, and what could not be controlled for too."""

from __future__ import annotations

import pytest
from prompt_tokens import by_prompt_tokens

from moe_ray.report.controls_text import controls_in_words, controls_table

TOPIC = {"selected": 14, "above": 11, "survive": 9, "batches": 2, "not_controlled": 0}


def test_a_sentence_says_how_many_of_how_many_survive():
    (sentence,) = controls_in_words({"topic": TOPIC}, by_prompt_tokens())
    assert sentence == (
        "Of 14 selected experts in 2 batches 9 survive the control for topic: 11 keep a risk difference above 0.05 when "
        "only prompts of the same topic are compared, and 9 of these are significant (corrected p of at most 0.05, labels "
        "shuffled within each topic). Fewer prompts are compared than were selected by, so an expert that does not survive "
        "is not cleared."
    )


@pytest.mark.parametrize(
    ("number", "said"), [(1, "In 1 further batch too few prompts"), (3, "In 3 further batches too few prompts")]
)
def test_batches_that_could_not_be_controlled_are_named(number, said):
    (sentence,) = controls_in_words({"topic": TOPIC | {"not_controlled": number}}, by_prompt_tokens())
    assert said in sentence


def test_without_a_test_nothing_is_said_about_significance_but_that():
    (sentence,) = controls_in_words({"template": TOPIC | {"survive": 11}}, by_prompt_tokens(permutations=0))
    assert "11 survive the control for template" in sentence
    assert sentence.endswith("no significance was computed.")


def test_the_table_has_a_row_per_factor_with_shares():
    table = controls_table({"topic": TOPIC, "template": TOPIC | {"survive": 7}})
    assert table["controlled for"].tolist() == ["topic", "template"]
    assert table["share"].tolist() == [9 / 14, 0.5]
    assert controls_table({}).empty
