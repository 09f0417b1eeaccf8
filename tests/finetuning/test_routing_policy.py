"""Where a batch's tokens may go while it trains: which are restricted, to what, and how that changes over the steps."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
import torch
from families import build, mask, routing_spied, rows
from policies import POLICIES, ROUTINGS, config_of
from training_runs import BATCHES, CONFIG, EXPERTS, train

from moe_ray.errors import InputError
from moe_ray.finetuning.gradients import accumulate_gradient, without_noise
from moe_ray.finetuning.routing_policy import RoutingPolicy
from moe_ray.finetuning.trainable_experts import trainable_experts
from moe_ray.models.tokenization import TokenizedRow

ROWS = [TokenizedRow([3, 4], [5], is_unsafe=True), TokenizedRow([3], [4, 5, 6], is_unsafe=False)]
UNION = BATCH = ((0, 2, 3, 5), (1, 4, 6))


@pytest.mark.parametrize(
    ("routing", "expected"),
    [
        ("masked", [[1, 1, 1, 0], [1, 1, 1, 1]]),
        ("masked_unsafe", [[1, 1, 1, 0], [0, 0, 0, 0]]),
        ("masked_prompt", [[1, 1, 0, 0], [1, 0, 0, 0]]),
        ("masked_response", [[0, 0, 1, 0], [0, 1, 1, 1]]),
        ("natural", [[0] * 4] * 2),
        ("boosted", [[0] * 4] * 2),
        ("annealed", [[0] * 4] * 2),
    ],
)
def test_which_tokens_are_restricted_padding_never(routing, expected):
    assert POLICIES[routing].restricted_tokens(ROWS).astype(int).tolist() == expected


def test_a_row_without_a_label_is_refused_where_labels_matter():
    unlabelled = [row._replace(is_unsafe=None) for row in ROWS]
    with pytest.raises(InputError, match="got a row without a label"):
        POLICIES["masked_unsafe"].restricted_tokens(unlabelled)
    assert POLICIES["masked_prompt"].restricted_tokens(unlabelled).any()


@pytest.mark.parametrize("routing", ROUTINGS)
def test_only_policies_that_mask_say_what_tokens_may_reach(routing):
    mask_LE = np.array([[True, True, False], [True, False, False], [False, False, False]])
    reachable_LE = POLICIES[routing].reachable(mask_LE, num_experts_per_tok=2)
    assert np.array_equal(reachable_LE, mask_LE if routing.startswith("masked") else np.zeros_like(mask_LE))
    short_LE = replace(POLICIES[routing], short_layers="natural").reachable(mask_LE, num_experts_per_tok=2)
    assert short_LE.sum(axis=1).tolist() == ([2, 0, 0] if routing.startswith("masked") else [0, 0, 0])


def boosts(config, num_steps=8):
    return [RoutingPolicy.at_step(config, step, num_steps).boost for step in range(num_steps)]


def test_an_annealed_boost_falls_evenly_to_nothing_and_stays_there():
    config = replace(CONFIG, routing="annealed", boost=6.0, anneal_share=0.75)
    assert boosts(config) == pytest.approx([6.0, 5.0, 4.0, 3.0, 2.0, 1.0, 0.0, 0.0])


def test_a_boost_that_is_not_annealed_stays():
    assert set(boosts(replace(CONFIG, routing="boosted", boost=6.0, anneal_share=0.1))) == {6.0}
    assert set(boosts(replace(CONFIG, routing="natural"))) == {0.0}


def boosts_in_force(monkeypatch, config, **options):
    """The boost that the model had in each step of a training."""
    from moe_ray.routing.masking import route_towards

    seen = []

    def noted(model, mask_LE, *, boost):
        seen.append(boost)
        return route_towards(model, mask_LE, boost=boost)

    monkeypatch.setattr("moe_ray.finetuning.routing_policy.route_towards", noted)
    reports = train(build("olmoe"), config, **options)
    return seen, len(reports)


def test_in_a_training_the_boost_is_that_of_the_steps_number(monkeypatch):
    config = replace(CONFIG, routing="annealed", boost=3.0, anneal_share=0.5)
    seen, num_steps = boosts_in_force(monkeypatch, config)
    # Once the boost is gone, the router is left alone.
    assert (seen, num_steps) == ([3.0, 2.0, 1.0], 6)


def routed_experts(routing, batch):
    """Tokens x experts with a weight, per layer, while a batch's gradient is taken in one pass."""
    model = build("olmoe")
    mask_LE = mask(model, *BATCH)
    with trainable_experts(model, mask_LE) as trainable, routing_spied(model) as calls, without_noise(model):
        seen = accumulate_gradient(
            model, trainable, batch, mask_LE, config=replace(config_of(routing), tokens_of_a_pass=10**6), pad_id=0
        )
    return calls, mask_LE, seen


@pytest.mark.parametrize("routing", ["masked_unsafe", "masked_prompt", "masked_response"])
def test_restricted_tokens_reach_the_batchs_experts_only_and_others_more(routing):
    batch = rows((5, 4), (3, 2), (7, 3))
    calls, mask_LE, seen = routed_experts(routing, batch)
    is_restricted = torch.as_tensor(POLICIES[routing].restricted_tokens(batch).ravel())
    is_token = torch.as_tensor(POLICIES["masked"].restricted_tokens(batch).ravel())
    for number, (index_TK, weights_TK) in enumerate(calls):
        row_E = torch.as_tensor(
            mask_LE[number // 2]
        )  # each layer's experts run twice: frozen ones, and the batch's own
        if number % 2 == 0:
            reached = row_E[index_TK] | (weights_TK == 0)
            assert reached[is_restricted].all()
            assert not reached[is_token & ~is_restricted].all()
    assert not (seen.restricted_LE & ~mask_LE).any()
    assert (seen.routed_LE & ~mask_LE).any()


@pytest.mark.slow
def test_learning_from_unsafe_rows_alone_masks_are_the_same_with_and_without_safe_rows_masked():
    losses = {}
    for routing in ("masked", "masked_unsafe"):
        only_unsafe = {idx: [row for row in of_batch if row.is_unsafe] for idx, of_batch in BATCHES.items()}
        model = build("olmoe")
        mask_LE = mask(model, *BATCH)
        with trainable_experts(model, mask_LE) as trainable, without_noise(model):
            losses[routing] = [
                accumulate_gradient(model, trainable, of_batch, mask_LE, config=config_of(routing), pad_id=0).loss
                for of_batch in only_unsafe.values()
            ]
    assert losses["masked"] == pytest.approx(losses["masked_unsafe"], abs=1e-5)


@pytest.mark.slow
def test_policies_train_to_different_weights():
    learned = {}
    for routing in ROUTINGS:
        model = build("olmoe")
        train(model, config_of(routing))
        learned[routing] = model.model.layers[0].mlp.experts.down_proj[EXPERTS[7][0][1]].detach().clone()
    ordered = list(learned.values())
    assert not any(torch.equal(one, other) for one, other in pairwise([*ordered, ordered[0]]))
