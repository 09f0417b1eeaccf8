"""What is said of comparisons, sweeps and rounds follows the numbers."""

from __future__ import annotations

import math

import pandas as pd
import pytest

from moe_ray.report.study_text import (
    comparison_rows,
    describe_round,
    describe_settings,
    describe_sweep,
    trial_rows,
    verdict,
)
from moe_ray.studies.baselines import OURS
from moe_ray.studies.comparison import BASE
from moe_ray.studies.rounds import RoundReport


def figure(name, value, low, high, n=40):
    return {name: value, f"{name}_low": low, f"{name}_high": high, f"{name}_n": n}


def arm(name, unsafe, safe=(0.0, -0.1, 0.1), neutral=(0.5, 0.375, 0.625)):
    return {
        "arm": name,
        "experts_per_batch": None if name == "full" else 3.0,
        "trainable_parameters": 12345,
        "train_seconds": 1.25,
        **figure("unsafe_refusal_rate", 0.75, 0.6, 0.86),
        **figure("safe_refusal_rate", 0.05, 0.014, 0.165),
        **figure("safe_target_loss", 0.2, 0.1, 0.3),
        **figure("neutral_loss", 0.5, 0.4, 0.6, 3),
        **figure("ours_minus_unsafe_refusal_rate", *unsafe),
        **figure("ours_minus_safe_refusal_rate", *safe),
        **figure("ours_minus_neutral_loss", *neutral, 3),
    }


ZERO = (0.0, -0.1, 0.1)
TABLE = pd.DataFrame(
    [
        arm(BASE, (0.75, 0.6, 0.85)),
        arm(OURS, ZERO),
        arm("weaker", (0.5, 0.316, 0.631), neutral=(-0.25, -0.375, -0.125)),
        arm("stronger", (-0.25, -0.402, -0.111), (-0.7, -0.814, -0.509)),
        arm("alike", ZERO, neutral=(0.5, -0.5, 1.5)),
    ]
)


def test_the_verdict_names_what_is_significant_and_what_is_not():
    unsafe, safe, neutral, caution = verdict(TABLE).splitlines()
    assert unsafe == (
        "Per-batch masks refused unsafe prompts (n = 40) more often (better) than weaker (+50.0 points [+31.6, +63.1]); "
        "less often (worse) than stronger (-25.0 points [-40.2, -11.1]); with no significant difference from alike."
    )
    assert "less often (better) than stronger (-70.0 points" in safe
    assert safe.endswith("with no significant difference from weaker, alike.")
    assert neutral == (
        "On neutral text (n = 3) they forgot more (worse) than stronger (+0.500 nats/token [+0.375, +0.625]); less (better) "
        "than weaker (-0.250 nats/token [-0.375, -0.125]); with no significant difference from alike."
    )
    assert "not corrected for 3 comparisons" in caution


def test_the_verdict_changes_with_the_numbers():
    swapped = TABLE.assign(arm=[BASE, OURS, "stronger", "weaker", "alike"])
    assert "more often (better) than stronger" in verdict(swapped)
    assert "less often (worse) than weaker" in verdict(swapped)


def test_without_baselines_nothing_is_claimed():
    assert verdict(TABLE[:2]).startswith("No baseline was run")


def silent(table):
    return table.assign(**{name: math.nan for name in table if "neutral" in name})


def test_without_neutral_text_nothing_is_said_of_it():
    assert "neutral text" not in verdict(silent(TABLE))
    assert not [name for name in comparison_rows(silent(TABLE)) if "neutral" in name]


def test_a_comparison_has_a_row_for_every_arm_and_differences_for_baselines_only():
    rows = comparison_rows(pd.concat([TABLE, pd.DataFrame([arm("full", ZERO)])])).set_index("arm")
    rows.columns = [name.replace("\n", " ") for name in rows.columns]
    assert rows.loc["full", "experts per batch"] == "all"
    weaker = rows.loc["weaker"]
    assert weaker["experts per batch"] == "3.0"
    assert weaker["parameters"] == "12,345"
    assert weaker["unsafe refused"] == "75.0%\n[60.0%, 86.0%]"
    assert weaker["rise of neutral loss"] == "+0.500"
    assert weaker["per_batch − arm, unsafe (points)"] == "+50.0\n[+31.6, +63.1]"
    assert weaker["per_batch − arm, neutral (nats/token)"] == "-0.250\n[-0.375, -0.125]"
    assert set(rows.loc[[BASE, OURS], "per_batch − arm, unsafe (points)"]) == {""}


def trial(state, **more):
    known = {"objective": 0.875, "unsafe_refusal_rate": 0.875, "safe_refusal_rate": 0.0, "forgetting": -0.0001}
    return {
        "identify.threshold": 0.05,
        "finetune.learning_rate": 0.00123456,
        "state": state,
        "epochs": 2,
        "is_within_bound": True,
        "union_experts": 12,
        "identify_seconds": 0.125,
        "train_seconds": 3.0,
        **known,
        **more,
    }


def test_a_trial_says_why_it_is_no_finished_one_within_the_bound():
    failed = {"identify.threshold": 0.1, "finetune.learning_rate": 0.01, "state": "failed"}
    trials = [trial("finished"), trial("finished", is_within_bound=False), trial("stopped", train_seconds=None), failed]
    rows = trial_rows(pd.DataFrame(trials), ["identify.threshold", "finetune.learning_rate"])
    rows.columns = [name.replace("\n", " ") for name in rows.columns]
    assert rows["note"].tolist() == [
        "", "forgets more than sweep.max_forgetting", "stopped after epoch 2", "could not be trained",
    ]  # fmt: skip
    assert rows.loc[0].tolist()[:7] == ["1", "0.05", "0.001235", "0.875", "87.5%", "0.0%", "0.000"]
    assert rows["train s"].tolist() == ["3.0", "3.0", "–", ""]
    assert rows.loc[3, "objective"] == ""


def test_settings_are_told_by_their_dotted_keys():
    assert describe_settings({"identify.top_k": 12, "finetune.learning_rate": 0.00123456}) == (
        "identify.top_k=12, finetune.learning_rate=0.001235"
    )


@pytest.mark.parametrize(("is_within", "said"), [(True, "split.\n"), (False, "allows, this one included.\n")])
def test_a_sweep_names_its_winner_and_whether_it_is_within_the_bound(is_within, said):
    notes = {"winner": {"identify.top_k": 12}, "trials": 4, "stopped": 0, "failed": 1, "objective": "refusal_margin"}
    notes |= {"value": 0.875, "is_within_bound": is_within, "identify_seconds_max": 0.5}
    text = describe_sweep(notes, "URL")
    assert text.startswith("Winner of 4 trials (0 stopped early, 1 could not be trained): identify.top_k=12, with ")
    assert "refusal_margin 0.875 on the validation split" in text
    assert said in text
    assert "within 0.50 s" in text
    assert text.endswith("Heat map: URL/heat_map.png; configuration for `moe-ray full`: URL/winner.yaml")


def test_a_round_says_how_many_batches_are_below_target():
    report = RoundReport(
        round=1, lagging=(1, 2), shortfall=0.1, unsafe_refusal_rate=0.5, safe_refusal_rate=0.125, cost=0.225
    )
    assert describe_round(report, 4) == (
        "round 1: 2 of 4 batches are below their target (mean shortfall 10.0%); on the validation split, 50.0% of unsafe "
        "and 12.5% of safe prompts are refused"
    )
