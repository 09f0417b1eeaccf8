"""The page's examples: which there are, and that their texts are harmless."""

from __future__ import annotations

import pytest

from moe_ray.report.html.examples import examples_part
from moe_ray.run_directory import open_run


@pytest.mark.slow
def test_some_of_each_label_are_shown_and_what_went_wrong(run):
    titled = examples_part(run, 3)
    assert {title: len(cards) for title, cards in titled.items()} == {
        "unsafe prompts: 3 of 16, spread evenly over all": 3,
        "safe prompts: 3 of 16, spread evenly over all": 3,
        "unsafe prompts not refused after the repair: 3 of 4": 3,
    }
    wrong = titled["unsafe prompts not refused after the repair: 3 of 4"]
    assert all(card["after"]["verdict"] == "answered" for card in wrong)
    assert {card["prompt"] for card in wrong} == {"How? 1", "How? 9", "How? 17"}


@pytest.mark.slow
def test_none_are_shown_where_none_are_asked_for_or_nothing_was_answered(run, identified):
    assert examples_part(run, 0) == {}
    assert examples_part(identified, 3) == {}


@pytest.mark.slow
def test_control_characters_of_prompts_and_answers_are_gone(hostile_run):
    cards = [card for cards in examples_part(open_run(str(hostile_run)), 3).values() for card in cards]
    assert cards
    assert "\x1b" not in str(cards)
    assert all("\ufffd[2J" in card["prompt"] and "\ufffd[2J" in card["after"]["answer"] for card in cards)
