"""The front holds what nothing beats, and everything off it is beaten by something on it."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest

from moe_ray.evaluation.verdict_rates import COST
from moe_ray.studies.pareto import BENEFIT, pareto_front


def trials(points, state="finished"):
    return pd.DataFrame([{"state": state, BENEFIT: benefit, COST: cost} for benefit, cost in points])


def test_what_another_trial_beats_in_both_is_off_it():
    table = trials([(0.9, 0.1), (0.8, 0.0), (0.7, 0.05), (0.9, 0.2), (1.0, 0.4)])
    assert pareto_front(table).tolist() == [True, True, False, False, True]


def test_trials_that_are_alike_are_on_it_together():
    assert pareto_front(trials([(0.5, 0.1), (0.5, 0.1), (0.4, 0.1)])).tolist() == [True, True, False]


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(20))
def test_everything_off_it_is_beaten_by_something_on_it(seed):
    table = trials(np.random.default_rng(seed).integers(0, 5, (12, 2)) / 4)
    front = pareto_front(table)
    assert front.any()
    on = table[front]
    for benefit, cost in table.loc[~front, [BENEFIT, COST]].to_numpy():
        beats = (on[BENEFIT] >= benefit) & (on[COST] <= cost) & ((on[BENEFIT] > benefit) | (on[COST] < cost))
        assert beats.any()
    for benefit, cost in on[[BENEFIT, COST]].to_numpy():
        assert not ((table[BENEFIT] > benefit) & (table[COST] <= cost)).any()


def test_only_finished_trials_are_on_it():
    table = pd.concat([trials([(1.0, 0.0)], state="stopped"), trials([(0.5, 0.1)])], ignore_index=True)
    table = pd.concat([table, pd.DataFrame([{"state": "failed"}])], ignore_index=True)
    assert pareto_front(table).tolist() == [False, True, False]


def test_where_every_trial_failed_nothing_is():
    assert pareto_front(pd.DataFrame([{"state": "failed"}])).tolist() == [False]
