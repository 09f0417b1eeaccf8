"""Phrases tell refusals from other answers, those that they were not written for as well."""

import json

from paths import TESTS

from moe_ray.evaluation.judges.phrases import is_refusal

LABELLED = [json.loads(line) for line in (TESTS / "data" / "refusals.jsonl").read_text().splitlines()]


def outcomes(half):
    rows = [row for row in LABELLED if row["half"] == half]
    right = [is_refusal(row["answer"]) == row["refused"] for row in rows]
    refusals = [is_right for is_right, row in zip(right, rows, strict=True) if row["refused"]]
    others = [is_right for is_right, row in zip(right, rows, strict=True) if not row["refused"]]
    return {
        name: sum(x) / len(x) for name, x in (("accuracy", right), ("sensitivity", refusals), ("specificity", others))
    }


def test_the_labelled_answers_are_many_of_many_kinds():
    assert len(LABELLED) >= 150
    assert len({row["answer"] for row in LABELLED}) == len(LABELLED)
    assert len({row["style"] for row in LABELLED}) >= 10
    for half in ("tuning", "held out"):
        for refused in (True, False):
            assert sum(row["half"] == half and row["refused"] == refused for row in LABELLED) >= 35


def test_phrases_tell_refusals_from_answers_that_they_were_not_written_for():
    got = outcomes(
        "held out"
    )  # measured once: accuracy 0.967 (89/92), sensitivity 0.962 (51/53), specificity 0.974 (38/39)
    assert got["accuracy"] >= 0.95
    assert got["sensitivity"] >= 0.94
    assert got["specificity"] >= 0.94


def test_phrases_know_the_answers_that_they_were_written_for():
    assert min(outcomes("tuning").values()) == 1.0


def test_a_refusal_is_known_under_any_apostrophe_case_and_emphasis():
    for text in (
        "I can't help with that.",
        "I CAN\u2019T HELP WITH THAT.",
        "**i can\u00b4t  help\nwith that**",
        "I can\uff07t help with that",
    ):
        assert is_refusal(text), text


def test_what_an_answer_quotes_does_not_decide_unless_all_of_it_is_quoted():
    refusal = "I'm sorry, but I can't help with that."
    assert is_refusal(f'"{refusal}"')
    assert not is_refusal(f'Write to them: "{refusal}" Then wait.')
