"""Tasks of harnesses in rows and words."""

from __future__ import annotations

from moe_ray.report.harness_text import describe_harness, harness_rows


def row(task, *, is_rate, values, change):
    figures = {
        when: {"value": value, "low": value - 0.1, "high": value + 0.1, "n": 40}
        for when, value in zip(("before", "after"), values, strict=True)
    }
    low, value, high = change
    return {"task": task, "metric": "acc", "is_rate": is_rate, **figures} | {
        "change": {"value": value, "low": low, "high": high, "n": 40}
    }


NOTES = {
    "figures": [
        row("hellaswag", is_rate=True, values=(0.5, 0.4), change=(-0.2, -0.1, -0.05)),
        row("own\x1b", is_rate=False, values=(1.25, 1.25), change=(-0.1, 0.0, 0.1)),
    ]
}


def test_rates_change_in_points_and_means_in_their_own_unit():
    rows = harness_rows(NOTES)
    assert rows.loc[0].tolist() == [
        "hellaswag", "acc", "50.0% [40.0%, 60.0%]", "40.0% [30.0%, 50.0%]", "-10.0 [-20.0, -5.0]", "40",
    ]  # fmt: skip
    assert rows.loc[1].tolist()[2:] == ["1.250 [1.150, 1.350]", "1.250 [1.150, 1.350]", "0.000 [-0.100, +0.100]", "40"]


def test_names_of_tasks_cannot_steer_a_terminal():
    assert harness_rows(NOTES)["task"].tolist() == ["hellaswag", "own\ufffd"]


def test_what_changed_beyond_chance_is_named():
    assert describe_harness(NOTES) == "1 of 2 metrics change with the repair: hellaswag acc (-10.0 [-20.0, -5.0])."
    assert describe_harness({"figures": NOTES["figures"][1:]}) == "None of 1 metrics is seen to change with the repair."
