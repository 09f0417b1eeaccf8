"""Trainable experts: gradient for the batch's experts only, and the same as fused tensors get (invariants 9, 11, 12)."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from families import (
    NUM_EXPERTS,
    SOME_FAMILIES,
    build,
    hooks_left,
    mask,
    routing_spied,
    rows,
    shared,
    state_of,
    token_ids,
)
from policies import POLICIES, ROUTINGS, routed_so

from moe_ray.errors import InputError
from moe_ray.experts import Expert, mask_to_experts
from moe_ray.finetuning.gradients import without_noise
from moe_ray.finetuning.routing_policy import RoutingPolicy
from moe_ray.finetuning.trainable_experts import trainable_experts
from moe_ray.models.loss import answer_loss
from moe_ray.models.moe_layers import find_moe_layers
from moe_ray.models.tokenization import TokenizedRow
from moe_ray.routing.masking import route_through, route_towards

IDS = token_ids(3, 11)
WHOLE_ROWS = [TokenizedRow(ids[:6], ids[6:], is_unsafe=n != 1) for n, ids in enumerate(IDS.tolist())]
LOGIT_TOLERANCE = 1e-5  # float32, logits of order 5
GRADIENT_TOLERANCE = 1e-5  # float32, relative to the largest entry of the gradient
BATCH = ((0, 2, 3, 5), (1, 4, 6))
UNION = ((0, 2, 3, 5, 7), (0, 1, 4, 6))
ROWS = rows((5, 4), (3, 2), (7, 3))


def gradients(model, trainable, mask_LE, routing="masked"):
    """Per expert and tensor, the gradient of a batch's loss; None where there is none."""
    with (
        without_noise(model),
        trainable.training_on(mask_LE, POLICIES[routing]) as batch,
        batch.passing(ROWS),
    ):
        answer_loss(model, ROWS, pad_id=0).sum().backward()
    found = {
        (expert, name): parameter.grad
        for expert, tensors in trainable.parameters.items()
        for name, parameter in tensors.items()
    }
    for parameter in trainable.all_parameters():
        parameter.grad = None
    return found


def assert_gradients_equal(got, expected):
    for key, gradient in expected.items():
        scale = gradient.abs().max().clamp(min=1e-3)
        torch.testing.assert_close(got[key] / scale, gradient / scale, atol=GRADIENT_TOLERANCE, rtol=0)


@pytest.mark.slow
@pytest.mark.parametrize("family", SOME_FAMILIES)
@pytest.mark.parametrize("routing", ROUTINGS)
def test_before_training_the_forward_is_the_models_own_under_the_same_routing(family, routing):
    model = build(family)
    mask_LE = mask(model, *BATCH)
    with routed_so(model, mask_LE, routing, WHOLE_ROWS), torch.no_grad():
        expected = model(IDS).logits
    with (
        trainable_experts(model, mask(model, *UNION)) as trainable,
        trainable.training_on(mask_LE, POLICIES[routing]) as batch,
        batch.passing(WHOLE_ROWS),
        torch.no_grad(),
    ):
        logits = model(IDS).logits
    torch.testing.assert_close(logits, expected, atol=LOGIT_TOLERANCE, rtol=0)


@pytest.mark.parametrize("family", SOME_FAMILIES)
def test_a_short_layer_may_route_naturally_and_its_experts_still_learn(family):
    model = build(family)
    mask_LE, restricted = mask(model, (0, 2, 3, 5), (4,)), mask(model, (0, 2, 3, 5), ())
    with route_through(model, restricted), torch.no_grad():
        expected = model(IDS).logits
    with trainable_experts(model, mask(model, *UNION)) as trainable:
        with trainable.training_on(mask_LE, RoutingPolicy(short_layers="natural")), torch.no_grad():
            logits = model(IDS).logits
        with without_noise(model), trainable.training_on(mask_LE, RoutingPolicy(short_layers="natural")) as monitor:
            answer_loss(model, ROWS, pad_id=0).sum().backward()
            reached = set(mask_to_experts(monitor.routed(), trainable.moe_layers.layers))
        learned = {
            expert
            for expert, tensors in trainable.parameters.items()
            if any(parameter.grad is not None for parameter in tensors.values())
        }
        expected_experts = set(trainable.experts_of(mask_LE))
    torch.testing.assert_close(logits, expected, atol=LOGIT_TOLERANCE, rtol=0)
    short = trainable.moe_layers.layers[1]
    assert sum(expert.layer == short for expert in reached) > 1
    # A forward that takes one expert after another never touches those that no token chose.
    assert expected_experts & reached <= learned <= expected_experts
    assert all(expert in reached for expert in learned if expert.layer == short)


@pytest.mark.parametrize("family", SOME_FAMILIES)
@pytest.mark.parametrize("routing", ROUTINGS)
def test_the_gradient_is_the_fused_tensors_own(family, routing):
    model = build(family)
    mask_LE = mask(model, *BATCH)
    with trainable_experts(model, mask(model, *UNION)) as trainable:
        got = gradients(model, trainable, mask_LE, routing)
    fused = {layer.layer: layer.expert_tensors() for layer in find_moe_layers(model)}
    with routed_so(model, mask_LE, routing, ROWS):
        answer_loss(model, ROWS, pad_id=0).sum().backward()
    expected = {
        (expert, name): tensor.grad[expert.expert]
        for expert in trainable.experts_of(mask_LE)
        for name, tensor in fused[expert.layer].items()
    }
    # An expert that no token chose under natural routing has no gradient here, and zeros in the fused tensor.
    got = {key: torch.zeros_like(expected[key]) if got[key] is None else got[key] for key in expected}
    assert any(gradient.abs().max() > 1e-3 for gradient in expected.values())
    assert_gradients_equal(got, expected)


@pytest.mark.parametrize("family", SOME_FAMILIES)
@pytest.mark.parametrize("routing", ROUTINGS)
def test_experts_outside_the_batch_have_no_gradient_at_all(family, routing):
    model = build(family)
    with trainable_experts(model, mask(model, *UNION)) as trainable:
        got = gradients(model, trainable, mask(model, *BATCH), routing)
        expected_experts = set(trainable.experts_of(mask(model, *BATCH)))
    assert {expert for (expert, _), gradient in got.items() if gradient is not None} <= expected_experts
    assert all(parameter.grad is None for parameter in model.parameters())


@pytest.mark.slow
@pytest.mark.parametrize("family", SOME_FAMILIES)
@pytest.mark.parametrize("routing", ROUTINGS)
def test_activation_checkpointing_gives_the_same_gradient_under_the_mask(family, routing):
    model = build(family)
    mask_LE = mask(model, *BATCH)
    with trainable_experts(model, mask(model, *UNION)) as trainable:
        expected = gradients(model, trainable, mask_LE, routing)
        model.activation_checkpointing_enable()
        with routing_spied(model) as calls:
            got = gradients(model, trainable, mask_LE, routing)
    assert len(calls) > (2 if routing == "masked" else 4)  # the experts ran again in the backward pass
    kept = {key: gradient for key, gradient in expected.items() if gradient is not None}
    assert {key for key, gradient in got.items() if gradient is not None} == set(kept)
    assert_gradients_equal(got, kept)


@pytest.mark.parametrize("family", SOME_FAMILIES)
def test_a_layer_without_experts_in_the_batch_shows_its_tuned_weights_without_gradient(family):
    model = build(family)
    with trainable_experts(model, mask(model, *UNION)) as trainable:
        first, second = mask(model, (0, 2), ()), mask(model, (), (1, 4))
        with trainable.training_on(first), torch.no_grad():
            before = model(IDS).logits
        with torch.no_grad():
            for expert in trainable.experts_of(second):
                for parameter in trainable.parameters[expert].values():
                    parameter.mul_(3.0)
        trainable.write_back(second)
        with trainable.training_on(first):
            after = model(IDS).logits
            after.sum().backward()
        assert (after - before).abs().max() > 100 * LOGIT_TOLERANCE
        assert all(
            parameter.grad is None
            for e in trainable.experts_of(second)
            for parameter in trainable.parameters[e].values()
        )


@pytest.mark.parametrize("family", SOME_FAMILIES)
def test_training_on_leaves_nothing_behind_after_an_error_in_the_experts(family):
    model = build(family)
    plain = model(IDS).logits
    with trainable_experts(model, mask(model, *UNION)) as trainable:
        layer = find_moe_layers(model)[1]
        layer.experts.act_fn = None
        if hasattr(layer.experts, "_apply_gate"):
            layer.experts._apply_gate = None
        with pytest.raises(TypeError, match="NoneType"), trainable.training_on(mask(model, *BATCH)):
            model(IDS)
    del layer.experts.__dict__["_apply_gate"]
    model_again = build(family)
    layer.experts.act_fn = getattr(find_moe_layers(model_again)[1].experts, "act_fn", None)
    assert hooks_left(model) == 0
    assert torch.equal(model(IDS).logits, plain)


def test_which_experts_tokens_reached_is_reported():
    model = build("olmoe")
    with (
        trainable_experts(model, mask(model, *UNION)) as trainable,
        trainable.training_on(mask(model, (0, 2, 3, 5), ())) as monitor,
        torch.no_grad(),
    ):
        model(IDS)
    routed_LE = monitor.routed()
    assert set(np.flatnonzero(routed_LE[0])) <= {0, 2, 3, 5}
    assert routed_LE[0].sum() >= 3
    assert not routed_LE[1].any()


def test_a_boost_sends_more_tokens_to_the_batchs_experts():
    model = shared("olmoe")
    mask_LE = mask(model, *BATCH)

    def share(boost: float) -> float:
        with routing_spied(model) as calls, route_towards(model, mask_LE, boost=boost), torch.no_grad():
            model(IDS)
        chosen = [
            torch.as_tensor(row)[index].float().mean().item() for row, (index, _) in zip(mask_LE, calls, strict=True)
        ]
        return sum(chosen) / len(chosen)

    assert share(0.0) < share(2.0) < share(50.0) == pytest.approx(1.0)


def test_trainable_numbers_are_those_of_the_union():
    model = build("gpt_oss")
    per_expert = sum(tensor[0].numel() for tensor in find_moe_layers(model)[0].expert_tensors().values())
    with trainable_experts(model, mask(model, *UNION)) as trainable:
        assert trainable.num_parameters() == 9 * per_expert


def test_write_back_changes_the_models_own_tensors_of_the_mask_only():
    model = build("olmoe")
    before = state_of(model)
    with trainable_experts(model, mask(model, *UNION)) as trainable:
        with torch.no_grad():
            for parameter in trainable.all_parameters():
                parameter.add_(1.0)
        trainable.write_back(mask(model, (3,), ()))
    changed = {name for name, tensor in state_of(model).items() if not torch.equal(tensor, before[name])}
    assert changed == {"model.layers.0.mlp.experts.gate_up_proj", "model.layers.0.mlp.experts.down_proj"}
    moved = model.model.layers[0].mlp.experts.down_proj - before["model.layers.0.mlp.experts.down_proj"]
    assert moved.abs().amax(dim=(1, 2)).nonzero().flatten().tolist() == [3]


# bfloat16 models with float32 copies


def test_a_bfloat16_models_copies_are_float32_and_exact():
    model = build("olmoe", dtype=torch.bfloat16)
    with trainable_experts(model, mask(model, *UNION)) as trainable:
        for expert, tensors in trainable.parameters.items():
            fused = find_moe_layers(model)[expert.layer].expert_tensors()
            assert all(tensor.dtype == torch.float32 for tensor in tensors.values())
            assert all(torch.equal(tensor, fused[name][expert.expert].float()) for name, tensor in tensors.items())


def test_write_back_into_bfloat16_rounds_to_nearest_even():
    model = build("olmoe", dtype=torch.bfloat16)
    with trainable_experts(model, mask(model, *UNION)) as trainable:
        tensor = trainable.parameters[Expert(0, 3)]["down_proj"]
        with torch.no_grad():
            # 1 + 2**-8 lies half way between 1 and the next bfloat16, 1 + 2**-7; 1 + 3 * 2**-8 half way above it.
            tensor.view(-1)[:4] = torch.tensor([1 + 2**-8, 1 + 3 * 2**-8, 1 + 2**-8 + 2**-20, -1 - 2**-9])
        trainable.write_back(mask(model, (3,), ()))
    written = model.model.layers[0].mlp.experts.down_proj[3].view(-1)[:4].tolist()
    assert written == [1.0, 1 + 2**-6, 1 + 2**-7, -1.0]


def test_steps_smaller_than_bfloat16_can_hold_add_up_in_the_copies():
    model = build("olmoe", dtype=torch.bfloat16)
    with trainable_experts(model, mask(model, *UNION)) as trainable:
        tensor = trainable.parameters[Expert(0, 3)]["down_proj"]
        with torch.no_grad():
            tensor.fill_(1.0)
            for _ in range(64):
                tensor.add_(2.0**-12)
                trainable.write_back(mask(model, (3,), ()))
    assert model.model.layers[0].mlp.experts.down_proj[3].unique().tolist() == [1 + 2**-6]


@pytest.mark.parametrize("family", SOME_FAMILIES)
def test_a_bfloat16_model_gives_its_float32_copies_a_float32_gradient(family):
    model = build(family, dtype=torch.bfloat16)
    with trainable_experts(model, mask(model, *UNION)) as trainable:
        got = gradients(model, trainable, mask(model, *BATCH))
    gradient = torch.cat([value.flatten() for value in got.values() if value is not None])
    assert gradient.dtype == torch.float32
    assert gradient.isfinite().all()
    assert gradient.abs().max() > 0


# Freezing, and refusing to do nothing


def test_which_parameters_trained_before_is_restored():
    model = build("olmoe")
    model.lm_head.weight.requires_grad_(False)
    with trainable_experts(model, mask(model, *UNION)):
        assert not any(parameter.requires_grad for parameter in model.parameters())
    assert [name for name, p in model.named_parameters() if not p.requires_grad] == ["lm_head.weight"]


def test_an_empty_union_is_refused():
    model = build("olmoe")
    with (
        pytest.raises(InputError, match="union of unsafe experts is empty"),
        trainable_experts(model, mask(model, (), ())),
    ):
        pass


def test_a_union_of_another_shape_is_refused():
    with pytest.raises(InputError, match="union: got shape"), trainable_experts(build("olmoe"), np.ones((3, 8), bool)):
        pass


def test_an_expert_outside_the_union_cannot_train():
    model = build("olmoe")
    with (
        trainable_experts(model, mask(model, (0,), (1,))) as trainable,
        pytest.raises(InputError, match="L00_E05 of the mask is not in the union"),
        trainable.training_on(mask(model, (5,), ())),
    ):
        pass


def test_training_under_another_mask_is_refused():
    model = build("olmoe")
    with (
        trainable_experts(model, mask(model, *UNION)) as trainable,
        pytest.raises(InputError, match="another expert mask"),
        route_through(model, np.ones((2, NUM_EXPERTS), bool)),
        trainable.training_on(mask(model, *BATCH)),
    ):
        pass
    assert hooks_left(model) == 0
