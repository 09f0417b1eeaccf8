"""A batch's gradient is the same however it is cut, and is multiplied by the batch's weight (invariant 13)."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from families import SOME_FAMILIES, batch_masks, build
from policies import ROUTINGS, config_of
from training_runs import BATCHES, CONFIG, EXPERTS

from moe_ray.finetuning.collectives import gradient_or_zeros
from moe_ray.finetuning.gradients import accumulate_gradient, without_noise
from moe_ray.finetuning.trainable_experts import trainable_experts
from moe_ray.models.moe_layers import find_moe_layers
from moe_ray.routing.masking import route_towards

GRADIENT_TOLERANCE = 1e-5  # float32, relative to the largest entry of an expert's gradient


def gradient_of(model, trainable, config, **options):
    masks = batch_masks(model, EXPERTS)
    with without_noise(model):
        result = accumulate_gradient(model, trainable, BATCHES[9], masks[9], config=config, pad_id=0, **options)
    gradient = [gradient_or_zeros(p) for e in trainable.experts_of(masks[9]) for p in trainable.parameters[e].values()]
    for parameter in trainable.all_parameters():
        parameter.grad = None
    return result, gradient


@pytest.mark.slow
@pytest.mark.parametrize("family", SOME_FAMILIES)
@pytest.mark.parametrize(
    "limits", [{"rows_per_forward": 1}, {"rows_per_forward": 3}, {"tokens_per_forward": 12}, {"tokens_of_a_pass": 0}]
)
def test_micro_batching_changes_no_gradient(family, limits):
    model = build(family)
    model.train()
    with trainable_experts(model, batch_masks(model, EXPERTS).union) as trainable:
        whole, expected = gradient_of(model, trainable, CONFIG)
        cut, got = gradient_of(model, trainable, replace(CONFIG, **limits))
    assert cut.loss == pytest.approx(whole.loss, rel=1e-6)
    for one, other in zip(got, expected, strict=True):
        scale = other.abs().max().clamp(min=1e-3)
        torch.testing.assert_close(one / scale, other / scale, atol=GRADIENT_TOLERANCE, rtol=0)


@pytest.mark.slow
@pytest.mark.parametrize("routing", ROUTINGS)
@pytest.mark.parametrize("family", ["olmoe", "deepseek_v3"])
def test_under_every_policy_micro_batching_changes_no_gradient(family, routing):
    model, config = build(family), config_of(routing)
    with trainable_experts(model, batch_masks(model, EXPERTS).union) as trainable:
        whole, expected = gradient_of(model, trainable, replace(config, tokens_of_a_pass=10**6))
        for rows_per_forward in (1, 3):
            cut, got = gradient_of(model, trainable, replace(config, rows_per_forward=rows_per_forward))
            assert cut.loss == pytest.approx(whole.loss, rel=1e-6)
            assert (cut.routed_LE == whole.routed_LE).all()
            assert (cut.restricted_LE == whole.restricted_LE).all()
            for one, other in zip(got, expected, strict=True):
                scale = other.abs().max().clamp(min=1e-3)
                torch.testing.assert_close(one / scale, other / scale, atol=GRADIENT_TOLERANCE, rtol=0)


def test_rows_whose_tokens_reach_none_of_the_batchs_experts_teach_nothing():
    model, config = build("olmoe"), config_of("natural")
    masks = batch_masks(model, EXPERTS)
    with (
        trainable_experts(model, masks.union) as trainable,
        route_towards(model, masks[9], boost=-1e4),
    ):
        seen, gradient = gradient_of(model, trainable, config)
    assert seen.loss > 0
    assert not (seen.routed_LE & masks[9]).any()
    assert not any(g.any() for g in gradient)


@pytest.mark.parametrize("family", ["phimoe", "mixtral"])
def test_router_noise_is_off_while_training(family):
    model = build(family)
    model.train()
    for layer in find_moe_layers(model):
        layer.block.jitter_noise = layer.block.input_jitter_noise = 0.5
    with trainable_experts(model, batch_masks(model, EXPERTS).union) as trainable:
        first, second = (gradient_of(model, trainable, CONFIG)[1] for _ in range(2))
    assert all(torch.equal(one, other) for one, other in zip(first, second, strict=True))


@pytest.mark.parametrize("family", SOME_FAMILIES)
def test_under_autocast_the_float32_copies_get_a_finite_float32_gradient(family):
    model = build(family)
    with trainable_experts(model, batch_masks(model, EXPERTS).union) as trainable:
        with torch.autocast("cpu", torch.bfloat16):
            result, gradient = gradient_of(model, trainable, CONFIG)
        expected = gradient_of(model, trainable, CONFIG)[0]
    assert result.loss == pytest.approx(expected.loss, rel=0.05)  # bfloat16 has 8 bits
    assert all(g.dtype == torch.float32 and g.isfinite().all() for g in gradient)
    assert any(g.abs().max() > 0 for g in gradient)


def test_a_batchs_weight_multiplies_its_gradient():
    model = build("olmoe")
    with trainable_experts(model, batch_masks(model, EXPERTS).union) as trainable:
        plain, expected = gradient_of(model, trainable, CONFIG)
        weighted, got = gradient_of(model, trainable, CONFIG, weight=3.0)
    assert weighted.loss == plain.loss
    for one, other in zip(got, expected, strict=True):
        torch.testing.assert_close(one, 3 * other, atol=1e-6, rtol=1e-5)
