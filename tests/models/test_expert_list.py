"""A list of experts stands in for the fused tensor: the same numbers and gradients, and no stack where none is needed."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from families import SOME_FAMILIES, batch_masks, build
from torch import nn
from training_runs import BATCHES, CONFIG, EXPERTS, train

from moe_ray.finetuning import expert_forward
from moe_ray.finetuning.gradients import accumulate_gradient, without_noise
from moe_ray.finetuning.trainable_experts import trainable_experts
from moe_ray.models.expert_list import ExpertList

PARAMETERS = [nn.Parameter(torch.randn(4, 3, generator=torch.Generator().manual_seed(n))) for n in range(5)]
STACK = torch.stack(PARAMETERS).detach()


@pytest.fixture
def experts():
    for parameter in PARAMETERS:
        parameter.grad = None
    return ExpertList(PARAMETERS)


@pytest.fixture
def stacks(monkeypatch):
    """Every stack of matrices that is made; norms are stacked as well."""
    made = []
    stack = torch.stack

    def spied(tensors, *args):
        made.extend(tensor.shape for tensor in tensors[:1] if tensor.ndim > 1)
        return stack(tensors, *args)

    monkeypatch.setattr(torch, "stack", spied)
    return made


@pytest.mark.parametrize("index", [2, -1, torch.tensor(3)])
def test_one_expert_is_the_parameter_itself(experts, stacks, index):
    assert experts[index] is PARAMETERS[int(index)]
    assert not stacks


@pytest.mark.parametrize(
    "index", [slice(1, 3), torch.tensor([4, 0, 4]), [1, 2], (slice(None), 0), None, torch.tensor(True), ...]
)
def test_any_other_index_is_the_stacks(experts, index):
    assert torch.equal(experts[index], STACK[index])


@pytest.mark.parametrize(
    "use",
    [
        lambda experts: torch.bmm(torch.ones(5, 2, 4), experts),
        lambda experts: torch.einsum("eoi->ei", experts),
        lambda experts: experts.transpose(1, 2),
        lambda experts: experts.to(torch.float64),
        lambda experts: torch.cat([experts, experts]),
        lambda experts: F.linear(torch.ones(2, 3), experts.view(20, 3)),
    ],
)
def test_what_reads_the_whole_tensor_gets_the_stack_and_its_gradient(experts, use):
    expected = nn.Parameter(STACK.clone())
    result = use(experts)
    assert torch.equal(result, use(expected))
    result.square().sum().backward()
    use(expected).square().sum().backward()
    assert torch.equal(torch.stack([parameter.grad for parameter in PARAMETERS]), expected.grad)


def test_it_has_the_shape_and_type_of_the_stack(experts):
    assert (experts.shape, experts.ndim, experts.dtype, len(experts)) == ((5, 4, 3), 3, torch.float32, 5)
    assert not hasattr(experts, "no_such_attribute")


def gradients(family, implementation="eager"):
    model = build(family)
    model.set_experts_implementation(implementation)
    masks = batch_masks(model, EXPERTS)
    with trainable_experts(model, masks.union) as trainable, without_noise(model):
        seen = accumulate_gradient(model, trainable, BATCHES[7], masks[7], config=CONFIG, pad_id=0)
        return seen.loss, [parameter.grad for parameter in trainable.all_parameters()]


@pytest.mark.parametrize("family", SOME_FAMILIES)
def test_loss_and_gradient_are_those_of_a_stack_to_the_last_digit(family, monkeypatch):
    loss, listed = gradients(family)
    monkeypatch.setattr(expert_forward, "ExpertList", torch.stack)
    expected_loss, stacked = gradients(family)
    assert loss == expected_loss
    for one, other in zip(listed, stacked, strict=True):
        # Of an expert that no token chose, a stack's gradient is zeros and a list's is none; the trainer fills it up.
        assert torch.equal(other, one) if one is not None else other is None or not other.any()


@pytest.mark.parametrize("implementation", ["grouped_mm", "batched_mm"])
def test_implementations_that_want_one_tensor_get_it(implementation):
    expected_loss, expected = gradients("olmoe")
    loss, got = gradients("olmoe", implementation)
    assert loss == pytest.approx(expected_loss, rel=1e-5)
    for one, other in zip(got, expected, strict=True):
        if one is not None and other is not None:
            torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-4)


def test_a_familys_eager_forward_trains_without_a_stack_of_experts(stacks):
    train(build("olmoe"))
    assert not stacks
