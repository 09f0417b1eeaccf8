"""Scores of samples as figures: paired by sample, rates where every score is 0 or 1."""

from __future__ import annotations

import math

import pytest

from moe_ray.harness.scores import harness_figures, plain_number, score_table


def table(values, *, metric="acc", task="tiny"):
    return score_table(
        [{"task": task, "metric": metric, "sample": n, "value": value} for n, value in enumerate(values)]
    )


def test_a_rate_has_its_interval_and_the_change_is_of_the_same_samples():
    (row,) = harness_figures(table([1, 1, 0, 0, 1, 0]), table([0, 0, 1, 1, 0, 0])[::-1])
    assert row["is_rate"]
    assert (row["before"]["value"], row["after"]["value"]) == (0.5, pytest.approx(1 / 3))
    assert row["change"]["value"] == pytest.approx(-1 / 6)
    assert row["change"]["n"] == 6
    assert row["change"]["low"] < row["change"]["value"] < row["change"]["high"]


def test_scores_that_are_no_rates_have_means():
    (row,) = harness_figures(table([0.25, 0.5, 1.0, 0.0]), table([0.5, 0.75, 1.0, 0.25]))
    assert not row["is_rate"]
    assert row["change"]["value"] == pytest.approx(0.1875)


def test_tasks_and_metrics_are_apart():
    rows = harness_figures(table([1, 0]), table([1, 1]))
    assert [(row["task"], row["metric"]) for row in rows] == [("tiny", "acc")]


def test_what_is_no_number_is_no_score():
    assert [plain_number(value) for value in (True, 1, 0.5, math.nan, (1.0, 2), "1", None)] == [
        1.0, 1.0, 0.5, None, None, None, None,
    ]  # fmt: skip
