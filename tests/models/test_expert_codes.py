"""Experts as codes: what they stand for, what lies over them, and what a backward pass keeps of them."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.multiprocessing.reductions import StorageWeakRef

from moe_ray.config.quantisation import bytes_per_number
from moe_ray.models.expert_codes import (
    ExpertCodes,
    codes_of,
    dequantise,
    dequantised_again,
    keep_as_codes,
    num_weights,
    quantise,
)

LARGEST_HALF_STEP = {"int8": 0.5 / 127, "4bit": 0.1520}
"""Of the largest number that shares a scale: half the distance of two neighbouring codes, of NF4 the widest one."""


@pytest.fixture(params=["int8", "4bit"])
def method(request):
    if request.param == "4bit":
        pytest.importorskip("bitsandbytes", reason="moe-ray[quantised] is not installed")
    return request.param


def fused(*shape, dtype=torch.float32, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def module_of(weights, method):
    module = nn.Module()
    module.gate_up_proj = nn.Parameter(weights.clone())
    keep_as_codes(module, "gate_up_proj", weights, method)
    return module


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(16, 64), (5, 7), (1, 3)])
def test_a_matrix_comes_back_within_half_a_step_in_its_own_type(method, shape, dtype):
    weights = fused(*shape, dtype=dtype)
    found = dequantise(*quantise(weights, method), method, shape=shape, dtype=dtype)
    assert (found.shape, found.dtype) == (weights.shape, dtype)
    half_step = LARGEST_HALF_STEP[method] * weights.float().abs().max()
    rounded = weights.float().abs().max() * torch.finfo(dtype).eps
    assert (found.float() - weights.float()).abs().max() <= half_step + rounded
    assert not torch.equal(found, weights)


def test_rows_and_blocks_of_zeros_stay_zeros(method):
    weights = fused(4, 64)
    weights[1] = 0
    found = dequantise(*quantise(weights, method), method, shape=(4, 64), dtype=torch.float32)
    assert found.isfinite().all()
    assert (found[1] == 0).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_codes_take_what_the_plan_says(method, dtype):
    codes = ExpertCodes(fused(3, 16, 64, dtype=dtype), method)
    stored = sum(tensor.numel() * tensor.element_size() for tensor in codes.parameters())
    assert stored == 3 * 16 * 64 * bytes_per_number(method, 64)


def test_the_stand_in_gives_slices_and_the_stack(method):
    module = module_of(fused(4, 8, 16), method)
    codes, stand_in = codes_of(module)["gate_up_proj"], module.gate_up_proj
    expected = torch.stack([codes.weights_of(expert) for expert in range(4)])
    assert (stand_in.shape, stand_in.dtype, len(stand_in)) == ((4, 8, 16), torch.float32, 4)
    assert torch.equal(stand_in[2], expected[2])
    assert torch.equal(stand_in[torch.tensor(3)], expected[3])
    assert torch.equal(stand_in[-1], expected[3])
    assert torch.equal(stand_in[torch.tensor([1, 0])], expected[[1, 0]])
    assert torch.equal(stand_in.transpose(1, 2), expected.transpose(1, 2))
    assert torch.equal(torch.stack(list(stand_in)), expected)
    assert num_weights(module) == 4 * 8 * 16


def test_what_is_put_lies_over_the_codes_and_they_stay_as_they_are(method):
    module = module_of(fused(4, 8, 16), method)
    codes = codes_of(module)["gate_up_proj"]
    before = [tensor.clone() for tensor in codes.parameters()]
    own, learned = codes.weights_of(1), fused(8, 16, seed=1)
    codes.put(1, learned)
    learned += 1  # what is put is a copy
    assert torch.equal(module.gate_up_proj[1], fused(8, 16, seed=1))
    assert torch.equal(module.gate_up_proj.stack[1], fused(8, 16, seed=1))
    assert all(torch.equal(*pair) for pair in zip(before, codes.parameters(), strict=True))
    codes.put(1, None)
    assert torch.equal(module.gate_up_proj[1], own)


def test_a_deep_copy_has_codes_and_learned_weights_of_its_own(method):
    module = module_of(fused(4, 8, 16), method)
    other = copy.deepcopy(module)
    codes_of(other)["gate_up_proj"].put(0, torch.zeros(8, 16))
    assert (other.gate_up_proj[0] == 0).all()
    assert not (module.gate_up_proj[0] == 0).all()


@pytest.mark.parametrize("as_stack", [False, True])
def test_backward_dequantises_again_and_the_graph_keeps_no_weights(method, as_stack):
    module = module_of(fused(4, 16, 16), method)
    outer = nn.ModuleDict({"experts": module})
    hidden = fused(5, 16, seed=2).requires_grad_()

    def pass_through(watch):
        result = hidden
        for expert in (2, 0, 2):
            weights = module.gate_up_proj.stack[expert] if as_stack else module.gate_up_proj[expert]
            watch.append(StorageWeakRef(weights.untyped_storage()))
            result = nn.functional.linear(result, weights).tanh()
        return result.sum()

    kept: list[StorageWeakRef] = []
    (expected,) = torch.autograd.grad(pass_through(kept), hidden)
    alive: list[StorageWeakRef] = []
    loss = pass_through(alive)
    assert [storage.expired() for storage in alive] == [False] * 3
    del loss
    with dequantised_again(outer):
        loss = pass_through(kept := [])
        assert [storage.expired() for storage in kept] == [True] * 3
        (gradient,) = torch.autograd.grad(loss, hidden)
    assert torch.equal(gradient, expected)
    assert codes_of(module)["gate_up_proj"].on_dequantised is None
