"""The table of baselines: paired differences of known answers."""

import json
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest

from moe_ray.evaluation.intervals import paired_difference
from moe_ray.studies.baselines import BASE, OURS
from moe_ray.studies.comparison import (
    ArmResult,
    comparison_table,
    figure_in_columns,
    pooled,
    share_to_judge,
)
from moe_ray.studies.measured import Measured

N = 40


def measured(unsafe_refused, safe_refused=(), *, loss=1.0, neutral=2.0, category="c"):
    refused = np.zeros(2 * N, dtype=bool)
    refused[list(unsafe_refused)] = True
    refused[[N + index for index in safe_refused]] = True
    answers = pd.DataFrame(
        {
            "id": [f"e{index}" for index in range(2 * N)],
            "label": ["unsafe"] * N + ["safe"] * N,
            "category": category,
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
    return Measured(answers=answers, neutral=texts)


def result(name, *seeds, parameters=10):
    """An arm that was measured once, at the end of its steps."""
    return ArmResult(
        name=name,
        measured=[{1.0: measured} for measured in seeds],
        steps={1.0: 4},
        experts_per_batch=3.0,
        trainable_parameters=parameters,
        train_seconds=1.0,
    )


def arm(name, *args, **more):
    return result(name, measured(*args, **more))


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


@pytest.mark.slow
def test_differences_to_ours_are_paired_on_the_same_prompts(table):
    ours, weaker = np.arange(N) < 30, np.arange(N) < 10
    expected = paired_difference(weaker, ours, clusters=np.arange(N))
    row = table.loc["weaker"]
    got = [row[f"ours_minus_unsafe_refusal_rate{end}"] for end in ("", "_low", "_high")]
    assert got == pytest.approx([expected.value, expected.low, expected.high])
    assert row["ours_minus_unsafe_refusal_rate_n"] == N
    assert table.loc[OURS, "ours_minus_unsafe_refusal_rate"] == 0


@pytest.mark.slow
def test_forgetting_is_the_rise_above_the_base_model_on_safe_targets_and_neutral_text(table):
    assert table.loc[OURS, "safe_target_loss"] == pytest.approx(0.2)
    assert table.loc[OURS, "neutral_loss"] == pytest.approx(0.5)
    assert table.loc[BASE, "safe_target_loss"] == 0


@pytest.mark.slow
def test_a_figure_is_read_back_from_its_columns(table):
    row = table.loc["weaker"].to_dict()
    assert figure_in_columns(row, "unsafe_refusal_rate") == {
        "value": 0.25, "low": row["unsafe_refusal_rate_low"], "high": row["unsafe_refusal_rate_high"], "n": N,
    }  # fmt: skip
    assert figure_in_columns(row, "no_such_figure") is None
    assert figure_in_columns(row | {"neutral_loss": float("nan")}, "neutral_loss") is None


@pytest.mark.slow
def test_without_neutral_text_nothing_is_known_about_what_was_forgotten_there():
    results = [arm(BASE, []), arm(OURS, range(3)), arm("random", range(3))]
    silent = [replace(each, measured=[{1.0: replace(each.measured[0][1.0], neutral=None)}]) for each in results]
    table = comparison_table(silent)
    assert table["neutral_loss"].isna().all()
    assert table["ours_minus_neutral_loss"].isna().all()


@pytest.mark.slow
def test_several_seeds_are_averaged_and_a_prompt_counts_once():
    seeds = [measured(range(10)), measured(range(20)), measured(range(30))]
    table = comparison_table([arm(BASE, []), result(OURS, *seeds), result("same", *seeds)]).set_index("arm")
    ours = table.loc[OURS]
    assert ours["unsafe_refusal_rate"] == pytest.approx(0.5)
    assert ours["unsafe_refusal_rate_n"] == N
    assert ours["seeds"] == 3
    assert (ours["unsafe_refusal_rate_smallest"], ours["unsafe_refusal_rate_largest"]) == (0.25, 0.75)
    assert table.loc["same", "ours_minus_unsafe_refusal_rate"] == 0
    # The base model has no seed: it is compared with each of them.
    assert table.loc[BASE, "ours_minus_unsafe_refusal_rate"] == pytest.approx(0.5)
    assert table.loc[BASE, "unsafe_refusal_rate_n"] == N


@pytest.mark.slow
def test_as_many_copies_of_one_seed_say_no_more_than_it_does_alone():
    once = comparison_table([arm(BASE, []), arm(OURS, range(20)), arm("other", range(10))]).set_index("arm")
    copies = [result(name, *[measured(range(size))] * 3) for name, size in ((OURS, 20), ("other", 10))]
    thrice = comparison_table([arm(BASE, []), *copies]).set_index("arm")
    for end in ("", "_low", "_high"):
        names = (f"unsafe_refusal_rate{end}", f"ours_minus_unsafe_refusal_rate{end}")
        # Clusters get Student's quantile, single examples the normal one.
        assert thrice.loc["other", list(names)].tolist() == pytest.approx(
            once.loc["other", list(names)].tolist(), abs=0.02
        )


@pytest.mark.slow
def test_losses_of_several_seeds_are_averaged():
    several = [measured([], loss=1.2, neutral=2.5), measured([], loss=1.4, neutral=3.5)]
    table = comparison_table([arm(BASE, []), result(OURS, *several)]).set_index("arm")
    assert table.loc[OURS, "safe_target_loss"] == pytest.approx(0.3)
    assert table.loc[OURS, "neutral_loss"] == pytest.approx(1.0)
    assert table.loc[OURS, "neutral_loss_n"] == 3


def test_one_measurement_is_its_own_pool():
    alone = measured([])
    assert pooled([alone]) is alone


@pytest.mark.slow
def test_the_budget_is_stated_as_a_share_of_our_parameters():
    table = comparison_table(
        [result(BASE, measured([]), parameters=0), arm(OURS, []), result("full", measured([]), parameters=40)]
    )
    assert table["parameters_share"].tolist() == [0.0, 1.0, 4.0]


@pytest.mark.slow
def test_categories_that_did_not_train_have_figures_of_their_own():
    def both(refused, loss):
        seen, other = measured(refused, loss=loss), measured(range(4), loss=loss + 0.5, category="d")
        renamed = other.answers.assign(id="d" + other.answers["id"])
        return replace(seen, answers=pd.concat([seen.answers, renamed], ignore_index=True))

    base, ours = measured([], loss=1.0), both(range(20), 1.0)
    base = replace(base, answers=both([], 1.0).answers)
    table = comparison_table([result(BASE, base), result(OURS, ours)], trained=["c"]).set_index("arm")
    assert table.loc[OURS, "unsafe_refusal_rate"] == 0.5
    assert table.loc[OURS, "unsafe_refusal_rate_n"] == N
    assert table.loc[OURS, "other_unsafe_refusal_rate"] == 0.1
    assert table.loc[OURS, "other_safe_target_loss"] == pytest.approx(0.0)
    every = comparison_table([result(BASE, base), result(OURS, ours)]).set_index("arm")
    assert every["other_unsafe_refusal_rate"].isna().all()
    assert every.loc[OURS, "unsafe_refusal_rate_n"] == 2 * N


def curve(**rates):
    """A table with shares 0.5 and 1 and the given rates of unsafe refusals."""
    rows = [
        {"arm": name, "share": share, "unsafe_refusal_rate": value}
        for name, values in rates.items()
        for share, value in zip((0.5, 1.0), values, strict=True)
    ]
    return pd.DataFrame(rows)


def test_arms_are_judged_at_the_last_share_at_which_they_can_be_told_apart():
    fine = curve(base=(0, 0), per_batch=(0.5, 0.9), other=(0.2, 1.0))
    assert share_to_judge(fine) == (1.0, [])
    ceiling = curve(base=(0, 0), per_batch=(0.5, 0.95), other=(0.2, 1.0), weak=(0.1, 0.2))
    assert share_to_judge(ceiling) == (0.5, [OURS, "other"])
    everywhere = curve(base=(0, 0), per_batch=(1.0, 1.0), other=(1.0, 1.0))
    assert share_to_judge(everywhere) == (0.5, [OURS, "other"])


def test_others_at_the_ceiling_and_ours_below_it_can_be_told_apart():
    assert share_to_judge(curve(base=(0, 0), per_batch=(0.5, 0.8), a=(0.9, 1.0), b=(0.9, 1.0))) == (1.0, [])
