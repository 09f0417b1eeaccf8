"""The table of baselines: paired differences of known answers."""

import json
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest

from moe_ray.evaluation.intervals import paired_difference
from moe_ray.studies.baselines import OURS
from moe_ray.studies.comparison import BASE, ArmResult, comparison_table, figure_in_columns
from moe_ray.studies.measured import Measured

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


def test_a_figure_is_read_back_from_its_columns(table):
    row = table.loc["weaker"].to_dict()
    assert figure_in_columns(row, "unsafe_refusal_rate") == {
        "value": 0.25, "low": row["unsafe_refusal_rate_low"], "high": row["unsafe_refusal_rate_high"], "n": N,
    }  # fmt: skip
    assert figure_in_columns(row, "no_such_figure") is None
    assert figure_in_columns(row | {"neutral_loss": float("nan")}, "neutral_loss") is None


def test_without_neutral_text_nothing_is_known_about_what_was_forgotten_there():
    results = [arm(BASE, []), arm(OURS, range(3)), arm("random", range(3))]
    silent = [replace(result, measured=replace(result.measured, neutral=None)) for result in results]
    table = comparison_table(silent)
    assert table["neutral_loss"].isna().all()
    assert table["ours_minus_neutral_loss"].isna().all()
