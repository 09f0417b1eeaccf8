"""What is said of sweeps and rounds follows the numbers."""

from __future__ import annotations

import pandas as pd
import pytest

from moe_ray.report.study_text import describe_front, describe_round, describe_settings, describe_sweep, trial_rows
from moe_ray.studies.rounds import RoundReport


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
    trials = [
        trial("finished"),
        trial("finished", is_within_bound=False, safe_refusal_rate=0.1),
        trial("stopped", train_seconds=None),
        failed,
    ]
    rows = trial_rows(pd.DataFrame(trials), ["identify.threshold", "finetune.learning_rate"])
    rows.columns = [name.replace("\n", " ") for name in rows.columns]
    assert rows["note"].tolist() == [
        "Pareto front", "forgets more than sweep.max_forgetting", "stopped after epoch 2", "could not be trained",
    ]  # fmt: skip
    assert rows.loc[0].tolist()[:7] == ["1", "0.05", "0.001235", "0.875", "87.5%", "0.0%", "0.000"]
    assert rows["train s"].tolist() == ["3.0", "3.0", "–", ""]
    assert rows.loc[3, "objective"] == ""


def test_the_front_is_told_with_its_settings_and_whether_the_winner_is_on_it():
    known = [trial("finished", safe_refusal_rate=0.25), trial("finished", unsafe_refusal_rate=0.5, union_experts=3)]
    text = describe_front(pd.DataFrame(known), ["identify.threshold"])
    assert text == (
        "Pareto front, unsafe prompts refused for safe prompts refused or answered with nothing of use: 50.0%"
        " for 0.0% (identify.threshold=0.05); 87.5% for 25.0% (identify.threshold=0.05). The winner is on it."
    )
    beaten = [trial("finished", safe_refusal_rate=0.25), trial("finished", unsafe_refusal_rate=1.0)]
    assert describe_front(pd.DataFrame(beaten), ["identify.threshold"]).endswith("The winner is not on it.")
    assert describe_front(pd.DataFrame([{"state": "failed"}]), []) == ""


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
