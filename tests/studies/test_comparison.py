"""The table of baselines: paired differences of known answers, and words that follow the numbers."""

import json

import numpy as np
import pandas as pd
import pytest

from moe_ray.evaluation.intervals import paired_difference
from moe_ray.report.study_text import verdict
from moe_ray.studies.baselines import OURS
from moe_ray.studies.comparison import BASE, ArmResult, comparison_table
from moe_ray.studies.trial import Measured

N = 40


def arm(name, unsafe_refused, safe_refused=(), *, loss=1.0, neutral=2.0):
    refused = np.zeros(2 * N, dtype=bool)
    refused[list(unsafe_refused)] = True
    refused[[N + index for index in safe_refused]] = True
    answers = pd.DataFrame(
        {
            "id": [f"e{index}" for index in range(2 * N)],
            "label": ["unsafe"] * N + ["safe"] * N,
            "category": "c",
            "batch_idx": 0,
            "routing": "natural",
            "messages": [json.dumps([{"role": "user", "content": f"prompt {index}"}]) for index in range(2 * N)],
            "pair": None,
            "refused": refused,
            "target_loss": [9.0] * N + [loss * 4] * N,
            "target_tokens": 4,
        }
    )
    texts = pd.DataFrame(
        {"text": range(3), "loss": [neutral * 5 + step / 50 for step in range(3)], "num_tokens": [5] * 3}
    )
    measured = Measured(answers=answers, neutral=texts)
    return ArmResult(name=name, measured=measured, experts_per_batch=3.0, trainable_parameters=10, train_seconds=1.0)


@pytest.fixture(scope="module")
def table():
    results = [
        arm(BASE, []),
        arm(OURS, range(30), range(2), loss=1.2, neutral=2.5),
        arm("weaker", range(10), range(2)),
        arm("stronger", range(40), range(30)),
        arm("alike", [*range(29), 35], [5]),
    ]
    return comparison_table(results).set_index("arm", drop=False)


def test_differences_to_ours_are_paired_on_the_same_prompts(table):
    ours, weaker = np.arange(N) < 30, np.arange(N) < 10
    expected = paired_difference(weaker, ours, clusters=np.arange(N))
    row = table.loc["weaker"]
    got = [row[f"ours_minus_unsafe_refusal_rate{end}"] for end in ("", "_low", "_high")]
    assert got == pytest.approx([expected.value, expected.low, expected.high])
    assert row["ours_minus_unsafe_refusal_rate_n"] == N
    assert table.loc[OURS, "ours_minus_unsafe_refusal_rate"] == 0


def test_forgetting_is_the_rise_above_the_base_model_on_safe_targets_and_neutral_text(table):
    assert table.loc[OURS, "safe_target_loss"] == pytest.approx(0.2)
    assert table.loc[OURS, "neutral_loss"] == pytest.approx(0.5)
    assert table.loc[BASE, "safe_target_loss"] == 0


def test_the_closing_words_name_what_can_be_told_from_zero_and_what_cannot(table):
    unsafe, safe, neutral, caution = verdict(table).splitlines()
    more, less, same = unsafe.split("; ")
    assert "more often (better) than weaker (+50.0 [" in more
    assert less.startswith("less often (worse) than stronger (-25.0 [")
    assert same.startswith("as often, as far as can be told from zero, as alike")
    assert "n = 40" in unsafe
    assert "less often (better) than stronger" in safe
    assert "alike" in safe
    # Every text costs per-batch masks half a nat per token more than an arm that forgot nothing.
    assert neutral.startswith("On neutral text (n = 3) they forgot more (worse) than weaker (+0.500 [+0.500, +0.500])")
    assert "not corrected for 3 comparisons" in caution


def test_without_baselines_nothing_is_claimed(table):
    assert verdict(table.loc[[BASE, OURS]]).startswith("No baseline was run")


def test_words_change_with_the_numbers(table):
    swapped = table.copy()
    columns = [name for name in table.columns if name.startswith("ours_minus_unsafe")]
    swapped.loc["weaker", columns], swapped.loc["stronger", columns] = (
        table.loc["stronger", columns].to_list(),
        table.loc["weaker", columns].to_list(),
    )
    assert "more often (better) than stronger" in verdict(swapped)
    assert "less often (worse) than weaker" in verdict(swapped)


def test_a_model_without_neutral_text_has_an_empty_cell():
    results = [arm(BASE, []), arm(OURS, range(3))]
    silent = [
        ArmResult(**{**vars(result), "measured": Measured(answers=result.measured.answers, neutral=None)})
        for result in results
    ]
    table = comparison_table([*silent, silent[1].__class__(**{**vars(silent[1]), "name": "random"})])
    assert table["neutral_loss"].isna().all()
    assert "neutral text" not in verdict(table)


def test_words_on_forgetting_follow_the_interval(table):
    changed = table.copy()
    changed.loc["weaker", ["ours_minus_neutral_loss", "ours_minus_neutral_loss_low", "ours_minus_neutral_loss_high"]] = (
        -0.25, -0.375, -0.125,
    )  # fmt: skip
    changed.loc["alike", "ours_minus_neutral_loss_low"] = -0.5
    neutral = verdict(changed).splitlines()[2]
    assert "less (better) than weaker (-0.250 [-0.375, -0.125])" in neutral
    assert neutral.endswith("as much, as far as can be told from zero, as alike.")
