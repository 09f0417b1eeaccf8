import math

import pandas as pd
import pytest

from moe_ray.config.sweep import SweepConfig
from moe_ray.studies.objective import FAILED, OBJECTIVES, forgetting, plain_metrics, rank_trials, score

BASE = {"safe_target_loss": 0.5, "neutral_loss": 3.0}


def metrics(unsafe, safe, lost=0.0, **more):
    rates = {"unsafe_refusal_rate": unsafe, "safe_refusal_rate": safe, "safe_cost_rate": safe, "target_loss": 0.7}
    return rates | {"safe_target_loss": 0.5 + lost, "neutral_loss": 3.0} | more


def value(*args, bound=0.1, name="refusal_margin", **more):
    return score(name, metrics(*args, **more), BASE, max_forgetting=bound).value


def test_the_default_objective_rewards_unsafe_refusal_and_punishes_over_refusal():
    assert SweepConfig().objective == "refusal_margin"
    assert value(0.9, 0.1) > value(0.8, 0.1) > value(0.8, 0.2)
    assert value(0.9, 0.1) == pytest.approx(0.8)


def test_a_trial_that_forgets_more_than_the_bound_ranks_below_the_worst_that_does_not():
    worst_within, best_over = value(0.0, 1.0, 0.1), value(1.0, 0.0, 0.11)
    assert best_over < worst_within
    assert best_over > FAILED
    assert not score("refusal_margin", metrics(1.0, 0.0, 0.11), BASE, max_forgetting=0.1).is_within_bound


def test_forgetting_is_the_largest_rise_and_a_fall_elsewhere_does_not_make_up_for_it():
    assert forgetting(metrics(1, 0, -0.4, neutral_loss=3.2), BASE) == pytest.approx(0.2)
    assert forgetting(metrics(1, 0, -0.4), {"safe_target_loss": 0.5}) == pytest.approx(-0.4)


def test_unknown_forgetting_is_not_within_the_bound():
    unknown = score("refusal_margin", metrics(1.0, 0.0), {}, max_forgetting=10.0)
    assert math.isnan(unknown.forgetting)
    assert not unknown.is_within_bound


def test_each_named_objective_measures_what_it_says():
    known = metrics(0.9, 0.2)
    assert {name: round(of(known), 6) for name, of in OBJECTIVES.items()} == {
        "refusal_margin": 0.7,
        "unsafe_refusal": 0.9,
        "target_loss": -0.7,
    }


def test_metrics_are_counted_per_label_and_losses_weigh_by_tokens():
    answers = pd.DataFrame(
        {
            "label": ["safe", "safe", "unsafe", "unsafe"],
            "refused": [True, False, True, True],
            "target_loss": [2.0, 4.0, 9.0, 0.0],
            "target_tokens": [1, 2, 3, 0],
        }
    )
    neutral = pd.DataFrame({"loss": [6.0, 6.0], "num_tokens": [2, 4]})
    assert plain_metrics(answers, neutral) == {
        "unsafe_refusal_rate": 1.0,
        "unsafe_degenerate_rate": 0.0,
        "safe_refusal_rate": 0.5,
        "safe_cost_rate": 0.5,
        "unsafe_target_loss": 3.0,
        "safe_target_loss": 2.0,
        "target_loss": 2.5,
        "neutral_loss": 2.0,
    }


def test_finished_trials_rank_by_value_then_by_less_forgetting_and_fewer_experts():
    trials = pd.DataFrame(
        [
            ("a", "finished", 0.5, 0.1, 9),
            ("b", "stopped", 0.9, 0.0, 1),
            ("c", "finished", 0.5, 0.0, 9),
            ("d", "failed", FAILED, None, None),
            ("e", "finished", 0.5, 0.0, 3),
            ("f", "finished", 0.6, 0.3, 9),
        ],
        columns=["name", "state", "value", "forgetting", "union_experts"],
    )
    assert rank_trials(trials)["name"].tolist() == ["f", "e", "c", "a", "b", "d"]


def test_trials_that_all_failed_still_have_an_order():
    trials = pd.DataFrame({"name": ["a", "b"], "state": ["failed"] * 2, "value": [FAILED] * 2})
    assert rank_trials(trials)["name"].tolist() == ["a", "b"]
