"""The planted answer is in simulated counts, by the share that was asked for, and nothing else is."""

import numpy as np
import pytest

from moe_ray.experts import Expert
from moe_ray.testing.simulated_counts import Population, simulate

PLANTED = (Expert(1, 3), Expert(2, 2))
SHIFT = 0.4


def rates(counts, label):
    """(L, E): the share of the label's tokens that each expert got."""
    rows = counts.label == label
    return counts.counts_NLE[rows].sum(axis=0) / counts.num_tokens[rows].sum()


def differences(**options):
    counts = simulate(Population(), num_batches=40, **options)
    return rates(counts, "unsafe") - rates(counts, "safe")


def test_planted_experts_are_used_more_by_the_planted_share():
    got = differences(planted=PLANTED, shift=SHIFT)
    for expert in PLANTED:
        assert got[expert.layer, expert.expert] == pytest.approx(SHIFT, abs=0.05)


def test_no_other_expert_is_used_more():
    got = differences(planted=PLANTED, shift=SHIFT)
    for expert in PLANTED:
        got[expert.layer, expert.expert] = 0
    assert got.max() < 0.05
    # What the planted ones got was taken from the others of their layers.
    assert got.sum(axis=1) == pytest.approx([0, -SHIFT, -SHIFT, 0], abs=0.05)


def test_without_a_planted_expert_labels_differ_by_chance_only():
    assert np.abs(differences()).max() < 0.05


def test_every_token_is_routed_to_as_many_experts_as_the_population_says():
    counts = simulate(Population(num_experts_per_tok=3), num_batches=2, planted=PLANTED, shift=SHIFT)
    counts.check()
    assert counts.num_experts_per_tok == 3


def test_lengths_are_those_of_the_label():
    counts = simulate(Population(safe_tokens=(3, 5), unsafe_tokens=(8, 9)), num_batches=5)
    of_label = {label: set(counts.num_tokens[counts.label == label].tolist()) for label in ("safe", "unsafe")}
    assert of_label == {"safe": {3, 4, 5}, "unsafe": {8, 9}}


def test_the_same_seed_draws_the_same_prompts_and_another_one_others():
    first, same, other = (simulate(Population(), seed=seed).counts_NLE for seed in (0, 0, 1))
    assert np.array_equal(first, same)
    assert not np.array_equal(first, other)
