"""Experts that follow a topic or a template do not survive the control for it; those that follow harm do."""

from __future__ import annotations

import itertools

import numpy as np
import pandas as pd
import pytest
from prompt_tokens import by_prompt_tokens

from moe_ray.config.identify import IdentifyConfig
from moe_ray.experts import Expert
from moe_ray.identification.controls import (
    COLUMNS,
    controlled_effects,
    controls_of_batches,
    survival,
)
from moe_ray.identification.samples import Samples
from moe_ray.testing.simulated_counts import Population, simulate, simulate_confounded

SMALL = Population(num_layers=2, num_experts=8)
PLANTED = (Expert(0, 3), Expert(1, 5))
FALSE_ALARMS = 0.07
CONFIG = by_prompt_tokens(permutations=400)


def table_of(num_batches: int, seed: int = 0, config: IdentifyConfig = CONFIG, **planted) -> pd.DataFrame:
    """Controls of the planted experts in every batch, whether or not a rule would have selected them."""
    counts, fields = simulate_confounded(SMALL, num_batches=num_batches, shift=0.5, seed=seed, **planted)
    return controls_of_batches(counts, fields, dict.fromkeys(range(num_batches), PLANTED), config)


def share(table: pd.DataFrame, factor: str, column: str = "survives") -> float:
    return float(table.loc[table["factor"] == factor, column].mean())


@pytest.mark.slow
@pytest.mark.parametrize("factor", ["topic", "template"])
def test_experts_that_follow_a_factor_alone_do_not_survive_its_control(factor):
    table = table_of(100, **{f"by_{factor}": PLANTED})
    assert (table["risk_diff"] > CONFIG.threshold).mean() > 0.9  # any of them a plain rule would select
    assert share(table, factor) <= FALSE_ALARMS
    assert table.loc[table["factor"] == factor, "harm"].mean() == pytest.approx(0, abs=0.02)
    assert table.loc[table["factor"] == factor, "effect"].mean() == pytest.approx(0.25, abs=0.05)  # half of the shift


@pytest.mark.slow
def test_experts_that_follow_harm_survive_every_control():
    table = table_of(60, by_harm=PLANTED)
    for factor in ("topic", "template"):
        assert share(table, factor) > 0.8
        assert table.loc[table["factor"] == factor, "harm"].mean() == pytest.approx(0.5, abs=0.05)


@pytest.mark.slow
def test_the_control_for_one_factor_does_not_answer_for_the_other():
    table = table_of(60, by_template=PLANTED)
    assert share(table, "template") <= FALSE_ALARMS
    assert share(table, "topic", "is_above") > 0.8


@pytest.mark.slow
def test_where_nothing_is_going_on_no_more_batches_alarm_than_the_level_says():
    counts, fields = simulate_confounded(SMALL, num_batches=200, seed=5)
    everybody = [Expert(layer, expert) for layer in range(2) for expert in range(8)]
    table = controls_of_batches(counts, fields, dict.fromkeys(range(200), everybody), CONFIG)
    of_topic = table[table["factor"] == "topic"]
    assert (of_topic.groupby("batch_idx")["p_maxt"].min() <= 0.05).mean() <= FALSE_ALARMS


def a_sample(values, unsafe, sizes=None, pairs=None):
    unsafe = np.asarray(unsafe, dtype=bool)
    return Samples.of(values, np.ones(len(unsafe)) if sizes is None else sizes, unsafe, pairs)


def test_effects_are_those_of_a_table_worked_by_hand():
    # One expert. Topic a: safe 1/4, unsafe 3/4; topic b: safe (1 + 2)/(4 + 4), unsafe 4/4; topic c has no unsafe prompt.
    samples = a_sample([[1], [3], [1], [2], [4], [4]], [0, 1, 0, 0, 1, 0], [4, 4, 4, 4, 4, 4])
    levels = np.array(["a", "a", "b", "b", "b", "c"], dtype=object)
    found = controlled_effects(samples, levels)
    assert found.harm_X == pytest.approx([(0.5 + 0.625) / 2])
    assert found.factor_X == pytest.approx([(np.std([0.75, 1]) + np.std([0.25, 0.375])) / 2])
    assert found.interaction_X == pytest.approx([np.std([0.5, 0.625])])
    assert (found.num_levels, found.num_prompts) == (2, 5)
    # 2 x 3 relabellings within topics; of the six means of two differences only the observed one is as large.
    assert found.p_maxt_X == pytest.approx([1 / 6])


@pytest.mark.parametrize("num_levels", [1, 2])
def test_p_is_the_share_of_all_relabellings_within_levels(num_levels):
    rng = np.random.default_rng(num_levels)
    unsafe = np.array([0, 0, 1, 1] * num_levels, dtype=bool)
    levels = np.repeat([f"level {n}" for n in range(num_levels)], 4).astype(object)
    values = rng.random((len(unsafe), 3))
    found = controlled_effects(a_sample(values, unsafe), levels)
    effects = []
    for chosen in itertools.product(itertools.combinations(range(4), 2), repeat=num_levels):
        differences = []
        for level, picked in enumerate(chosen):
            own = values[4 * level : 4 * level + 4]
            rest = [n for n in range(4) if n not in picked]
            differences.append(own[list(picked)].mean(axis=0) - own[rest].mean(axis=0))
        effects.append(np.mean(differences, axis=0))
    standard = np.array(effects) / np.sqrt(np.square(effects).mean(axis=0))
    observed = found.harm_X / np.sqrt(np.square(effects).mean(axis=0))
    expected = [(standard.max(axis=1) >= value - 1e-9).mean() for value in observed]
    assert found.p_maxt_X == pytest.approx(expected)


def test_one_level_without_pairs_is_the_plain_difference():
    rng = np.random.default_rng(0)
    samples = a_sample(rng.integers(0, 9, (12, 4)), [0, 1] * 6, rng.integers(9, 30, 12))
    found = controlled_effects(samples, np.full(12, "all", dtype=object))
    assert found.harm_X == pytest.approx(samples.difference())
    assert found.interaction_X == pytest.approx(np.zeros(4))
    assert found.factor_X == pytest.approx(np.zeros(4))


def test_examples_of_a_pair_trade_with_each_other_only():
    pairs = np.array(["p", "p", "q", "q", "r", "r"], dtype=object)
    samples = a_sample([[1], [2], [5], [7], [0], [3]], [0, 1, 0, 1, 0, 1], pairs=pairs)
    found = controlled_effects(samples, np.full(6, "all", dtype=object))
    assert found.p_maxt_X == pytest.approx([1 / 8])  # 2 x 2 x 2 relabellings, the observed one the largest


def test_a_pair_over_two_levels_is_no_pair_within_them():
    pairs = np.array(["p", "q", "p", "q", "", ""], dtype=object)
    levels = np.array(["a", "a", "b", "b", "a", "b"], dtype=object)
    found = controlled_effects(a_sample([[1], [2], [5], [7], [0], [3]], [0, 0, 1, 1, 1, 0], pairs=pairs), levels)
    assert found.num_levels == 2
    assert 0 < found.p_maxt_X[0] <= 1


@pytest.mark.parametrize("levels", [["", "", "", ""], ["a", "a", "b", "b"]])
def test_without_a_level_of_both_labels_nothing_is_said(levels):
    samples = a_sample([[1], [2], [3], [4]], [0, 0, 1, 1])
    assert controlled_effects(samples, np.array(levels, dtype=object)) is None


def test_without_a_test_surviving_is_being_above_the_threshold():
    table = table_of(4, config=by_prompt_tokens(permutations=0), by_harm=PLANTED)
    assert table["p_maxt"].isna().all()
    assert table["survives"].equals(table["is_above"])
    assert table["survives"].any()


@pytest.mark.slow
def test_a_smaller_alpha_lets_fewer_survive_and_a_larger_threshold_too():
    def survive(**settings):
        return table_of(10, config=by_prompt_tokens(permutations=400, **settings), by_harm=PLANTED)["survives"].sum()

    assert survive(alpha=0.004) <= survive()
    assert survive(threshold=0.6) < survive()


def test_survival_is_counted_per_factor_over_the_batches_that_could_be_controlled():
    rows = [(0, "topic", True, True), (0, "topic", True, False), (3, "topic", False, False)]
    table = pd.DataFrame(rows, columns=["batch_idx", "factor", "is_above", "survives"])
    assert survival(table, num_batches=5) == {
        "topic": {"selected": 3, "above": 2, "survive": 1, "batches": 2, "not_controlled": 3}
    }
    assert survival(pd.DataFrame(columns=COLUMNS), num_batches=5) == {}


def test_prompts_without_fields_give_no_rows_and_missing_ones_none_either():
    counts = simulate(SMALL, num_batches=1)
    fields = pd.DataFrame({"batch_idx": 0, "in_batch_idx": range(16), "topic": "", "template": None})
    assert controls_of_batches(counts, fields, {0: PLANTED}, CONFIG).empty


@pytest.mark.parametrize(("num_levels", "is_there"), [(4, False), (8, True)])
def test_a_batch_in_which_nothing_could_be_significant_has_no_rows(num_levels, is_there):
    counts = simulate(SMALL, num_batches=1)
    topics = [f"{place % 8}" if place % 8 < num_levels else "" for place in range(16)]  # one safe and one unsafe each
    fields = pd.DataFrame({"batch_idx": 0, "in_batch_idx": range(16), "topic": topics, "template": ""})
    assert bool(len(controls_of_batches(counts, fields, {0: PLANTED}, CONFIG))) is is_there
