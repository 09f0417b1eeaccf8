"""Training in every family that trains: gradients are those of plain models, and nothing else moves."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import pytest
import torch
from families import hooks_left, rows
from moe_families import TRAINED, TRAINED_MASKED, UNMASKABLE, UNTRAINABLE, tiny_model
from removed_experts import masks_of, without_experts
from torch import Tensor, nn

from moe_ray.config.finetune import FinetuneConfig
from moe_ray.errors import InputError
from moe_ray.experts import Expert, Mask, mask_to_experts, masks_from_experts
from moe_ray.finetuning.gradients import accumulate_gradient
from moe_ray.finetuning.trainable_experts import trainable_experts
from moe_ray.finetuning.trainer import MaskedTrainer
from moe_ray.models.loss import answer_loss
from moe_ray.models.moe_layers import find_moe_layers

pytestmark = pytest.mark.slow

ROWS = rows((7, 4), (3, 2), (5, 6))
TOLERANCE = 1e-6
"""Of the largest gradient; most families compute in float64, some parts in float32."""


def gradients_of(model: nn.Module, mask_LE: Mask, routing: str) -> dict[Expert, dict[str, Tensor]]:
    """What moe-ray gives for the experts of the mask."""
    config = FinetuneConfig(routing=routing)
    with trainable_experts(model, mask_LE, dtype=model.dtype) as trainable:
        accumulate_gradient(model, trainable, ROWS, mask_LE, config=config, pad_id=0)
        return {
            expert: {name: p.new_zeros(p.shape) if p.grad is None else p.grad for name, p in tensors.items()}
            for expert, tensors in trainable.parameters.items()
        }


def gradients_of_plain(model: nn.Module, like: nn.Module) -> Mapping[int, dict[str, Tensor]]:
    """By layer, what autograd gives for the experts' own tensors, without anything of moe-ray in force.

    Args:
        model: may have other numbers of experts in its layers, which moe-ray would refuse.
        like: the same model as it was built.
    """
    tensors = {
        layer.layer: {name: getattr(model.get_submodule(layer.name), name) for name in layer.expert_tensors()}
        for layer in find_moe_layers(like)
    }
    with torch.enable_grad():
        loss = answer_loss(model, ROWS, pad_id=0).sum() / sum(len(row.answer_ids) for row in ROWS)
        flat = [tensor for named in tensors.values() for tensor in named.values()]
        found = iter(torch.autograd.grad(loss, flat, allow_unused=True, materialize_grads=True))
    return {layer: {name: next(found) for name in named} for layer, named in tensors.items()}


def assert_equal(got: Mapping[str, Tensor], expected: Mapping[str, Tensor], largest: float) -> None:
    for name, gradient in got.items():
        torch.testing.assert_close(gradient, expected[name].to(gradient), atol=TOLERANCE * largest, rtol=1e-5)


def largest_of(plain: Mapping[int, dict[str, Tensor]]) -> float:
    return max(float(gradient.abs().max()) for named in plain.values() for gradient in named.values())


@pytest.mark.parametrize("family", TRAINED)
def test_under_natural_routing_the_batchs_experts_get_the_gradient_that_the_plain_model_gives_them(family):
    model = tiny_model(family)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    plain = gradients_of_plain(model, model)
    mask_LE = np.zeros((len(find_moe_layers(model)), 8), dtype=bool)
    mask_LE[:, [1, 4, 6]] = True
    for expert, got in gradients_of(model, mask_LE, "natural").items():
        expected = {name: gradient[expert.expert] for name, gradient in plain[expert.layer].items()}
        assert_equal(got, expected, largest_of(plain))
    assert hooks_left(model) == 0
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())


@pytest.mark.parametrize("family", TRAINED_MASKED)
def test_under_a_mask_they_get_the_gradient_that_the_model_without_the_others_gives_them(family):
    model = tiny_model(family)
    layers = find_moe_layers(model)
    for mask_LE in masks_of(layers).values():
        plain = gradients_of_plain(without_experts(model, mask_LE), model)
        got = gradients_of(model, mask_LE, "masked")
        assert set(got) == set(mask_to_experts(mask_LE, layers.layers))
        for expert, tensors in got.items():
            kept = np.flatnonzero(mask_LE[layers.row_of(expert.layer)]).tolist()
            expected = {name: gradient[kept.index(expert.expert)] for name, gradient in plain[expert.layer].items()}
            assert_equal(tensors, expected, largest_of(plain))


@pytest.mark.parametrize("family", UNMASKABLE)
@pytest.mark.parametrize("routing", ["masked", "masked_response"])
def test_a_family_that_cannot_be_masked_is_refused_before_the_first_batch_trains(family, routing):
    model = tiny_model(family)
    layers = find_moe_layers(model)
    # The first batch has no expert in the layers that cannot be masked.
    selected = {0: [Expert(layers[-1].layer, 1)], 1: [Expert(layers[0].layer, 1)]}
    masks = masks_from_experts(selected, layers=layers.layers, num_experts=layers.num_experts)
    config = FinetuneConfig(routing=routing)
    with trainable_experts(model, masks.union) as trainable, pytest.raises(InputError, match=UNMASKABLE[family]):
        MaskedTrainer(model, trainable, {0: ROWS, 1: ROWS}, masks, config, pad_id=0, seed=0)


@pytest.mark.parametrize("family", UNTRAINABLE)
def test_a_family_that_cannot_be_trained_is_refused_with_the_reason(family):
    model = tiny_model(family)
    union_LE = np.ones((len(find_moe_layers(model)), 8), dtype=bool)
    with pytest.raises(InputError, match=UNTRAINABLE[family]), trainable_experts(model, union_LE):
        raise AssertionError("entered")
