"""LoRA on experts: only the batch's own move, by a matrix of low rank, and the budget is met."""

import copy
from dataclasses import replace

import numpy as np
import pytest
import torch
from families import SOME_FAMILIES, batch_masks, build
from training_runs import BATCHES, CONFIG, EXPERTS, changes, union_of

from moe_ray.experts import Expert
from moe_ray.finetuning.low_rank import LowRankExperts, low_rank, num_expert_parameters, rank_of_about
from moe_ray.finetuning.trainable_experts import TrainableExperts, trainable_experts
from moe_ray.finetuning.trainer import MaskedTrainer
from moe_ray.models.moe_layers import find_moe_layers

RANK_TOLERANCE = 1e-5
"""Singular values of float32 differences whose largest is of order 0.1."""


def trained(model, rank, *, config=CONFIG):
    masks = batch_masks(model, EXPERTS)
    with trainable_experts(model, masks.union, parametrisation=low_rank(rank)) as trainable:
        trainer = MaskedTrainer(model, trainable, BATCHES, masks, config, pad_id=0, seed=0)
        return trainable, trainer.run()


def state(model):
    return {name: tensor.clone() for name, tensor in [*model.named_parameters(), *model.named_buffers()]}


@pytest.mark.slow
@pytest.mark.parametrize("family", SOME_FAMILIES)
def test_only_the_batches_experts_move(family):
    model = build(family)
    before = state(model)
    trained(model, 3)
    others, moved = changes(model, before)
    assert others == set()
    # One that no token was routed to has no gradient, and weight decay leaves the second factor at 0.
    assert moved
    assert moved <= union_of(EXPERTS)


def test_an_expert_moves_by_a_matrix_of_the_given_rank():
    model, base = build("olmoe"), build("olmoe")
    trained(model, 2)
    for after, before in zip(find_moe_layers(model), find_moe_layers(base), strict=True):
        for name, tensor in after.expert_tensors().items():
            for expert in range(after.num_experts):
                moved = (tensor[expert] - before.expert_tensors()[name][expert]).detach()
                assert int(torch.linalg.matrix_rank(moved, atol=RANK_TOLERANCE)) <= 2


def test_before_a_step_every_weight_is_what_it_was_and_the_loss_is_that_of_whole_experts():
    model = build("olmoe")
    masks = batch_masks(model, EXPERTS)
    whole, low = TrainableExperts(model, masks.union), LowRankExperts(model, masks.union, rank=4)
    for expert in masks.union_experts:
        for name, weight in whole.tensors_of(expert).items():
            assert torch.equal(low.tensors_of(expert)[name], weight)


def test_the_first_gradient_of_the_second_factor_is_that_of_the_whole_matrix_through_the_first():
    model = build("olmoe")
    masks = batch_masks(model, EXPERTS)
    expert = Expert(0, 5)
    low = LowRankExperts(model, masks.union, rank=3)
    weights = low.tensors_of(expert)
    name = next(iter(weights))
    gradient = torch.randn_like(weights[name])
    (weights[name] * gradient).sum().backward()
    down, up = low.parameters[expert][f"{name}.down"], low.parameters[expert][f"{name}.up"]
    torch.testing.assert_close(up.grad, 2 * gradient @ down.detach().T)
    assert torch.equal(down.grad, torch.zeros_like(down))  # the second factor starts at 0


def test_training_learns():
    model = build("olmoe")
    _, reports = trained(model, 4)
    assert reports[-1].loss < reports[0].loss


def test_only_factors_train_and_biases_have_none():
    model = build("gpt_oss")  # its experts have biases
    trainable, _ = trained(model, 2)
    masks = batch_masks(model, EXPERTS)
    assert all(parameter.dim() == 2 for parameter in trainable.all_parameters())
    assert trainable.num_parameters() < num_expert_parameters(model, masks.union)


def test_micro_batches_do_not_change_what_is_learned():
    whole, cut = build("olmoe"), build("olmoe")
    trained(whole, 3)
    trained(cut, 3, config=replace(CONFIG, rows_per_forward=1))
    for (name, first), second in zip(whole.named_parameters(), cut.parameters(), strict=True):
        torch.testing.assert_close(first, second, atol=1e-4, rtol=0, msg=name)


@pytest.mark.parametrize("share", [0.2, 0.5, 1.0, 2.0])
def test_the_rank_comes_as_near_to_the_budget_as_a_rank_can(share):
    model = copy.deepcopy(build("olmoe"))
    union = batch_masks(model, EXPERTS).union
    every = np.ones_like(union)
    target = round(share * num_expert_parameters(model, union))
    rank = rank_of_about(model, every, target)
    sizes = {r: LowRankExperts(model, every, rank=r).num_parameters() for r in (rank - 1, rank, rank + 1) if r}
    assert min(sizes, key=lambda r: abs(sizes[r] - target)) == rank
