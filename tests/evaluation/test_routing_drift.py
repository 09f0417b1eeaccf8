"""How far routing moved, with intervals that hold what they say."""

import numpy as np
import pytest
from families import NUM_EXPERTS, shared
from held_out_examples import CONFIG, held_out

from moe_ray.evaluation.evaluate import answer_and_count, rows_to_answer
from moe_ray.evaluation.routing_drift import routing_drift
from moe_ray.routing.counts import RoutingCounts


def test_routing_drift_is_the_change_of_activation_rates(tokenizer):
    model = shared("olmoe")
    rows = rows_to_answer(held_out(), ["natural"])
    before = answer_and_count(model, tokenizer, rows, CONFIG, count=True).routing
    assert routing_drift(before, before)["mean_absolute_change"] == {"value": 0, "n": 10, "low": 0, "high": 0}
    moved = before.take(np.arange(len(before)))
    moved.counts_NLE[:, 1, 2] += 3
    got = routing_drift(before, moved)
    change = 3 * len(before) / before.num_tokens.sum()
    assert got["largest_change"]["value"] == pytest.approx(change)
    assert (got["layer"], got["expert"], got["largest_change"]["n"]) == (before.layers[1], 2, 10)
    assert got["mean_absolute_change"]["value"] == pytest.approx(change / (2 * NUM_EXPERTS))


def routed(num_tokens, counts_NLE):
    rows = np.arange(len(num_tokens))
    names = {name: np.full(len(rows), "", dtype=object) for name in ("label", "category", "role")}
    return RoutingCounts(
        batch_idx=rows,
        in_batch_idx=rows,
        num_tokens=num_tokens,
        counts_NLE=counts_NLE,
        layers=(0,),
        num_experts_per_tok=1,
        **names,
    )


def drift_of_a_draw(generator):
    """Half of what goes to expert 0 goes to expert 1 afterwards, more or less so from prompt to prompt."""
    num_tokens = generator.integers(20, 60, 40)
    first = generator.binomial(num_tokens, 0.6)
    moved = generator.binomial(first, generator.beta(4, 4, 40))
    counts = [np.stack([kept, num_tokens - kept], axis=1)[:, None] for kept in (first, first - moved)]
    return routing_drift(*(routed(num_tokens, part) for part in counts))


def test_the_interval_of_routing_drift_holds_the_truth_nineteen_times_in_twenty():
    generator = np.random.default_rng(0)
    draws = [drift_of_a_draw(generator)["mean_absolute_change"] for _ in range(400)]
    assert np.mean([draw["low"] <= 0.3 <= draw["high"] for draw in draws]) == pytest.approx(0.95, abs=0.03)
    assert np.mean([draw["high"] - draw["low"] for draw in draws]) < 0.1


def test_prompts_that_are_not_independent_count_once_in_routing_drift():
    num_tokens, counts = np.array([10, 20, 30]), np.array([[[5, 5]], [[10, 10]], [[20, 10]]])
    later = np.array([[[2, 8]], [[10, 10]], [[11, 19]]])
    once = routing_drift(routed(num_tokens, counts), routed(num_tokens, later))
    twice = [routed(*(np.repeat(part, 2, axis=0) for part in (num_tokens, one))) for one in (counts, later)]
    got = routing_drift(*twice, clusters=np.repeat(np.arange(3), 2))
    for name in ("mean_absolute_change", "largest_change"):
        assert {**got[name], "n": 3} == pytest.approx(once[name])
    assert routing_drift(*twice)["largest_change"]["high"] < got["largest_change"]["high"]
    lone = routing_drift(*twice, clusters=np.zeros(6))["largest_change"]
    assert (lone["value"], lone["low"], lone["high"]) == (once["largest_change"]["value"], None, None)
