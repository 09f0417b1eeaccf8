"""The fused AdamW does what the plain one does, and leaves parameters without a gradient alone."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from moe_ray.finetuning.optimizer import adamw


def trained(make, dtype):
    """Ten steps of two parameters; the second one has a gradient in the first step only."""
    generator = torch.Generator().manual_seed(0)
    parameters = [nn.Parameter(torch.randn(7, 5, generator=generator).to(dtype)) for _ in range(2)]
    optimizer = make(parameters)
    for step in range(10):
        for parameter in parameters[: 2 if step == 0 else 1]:
            parameter.grad = torch.randn(7, 5, generator=generator).to(dtype)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if step == 0:
            after_first = parameters[1].detach().clone()
    assert torch.equal(parameters[1], after_first)
    return torch.stack(parameters)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.bfloat16, 0.1)])
def test_it_moves_as_the_plain_one(dtype, tolerance):
    # In bfloat16 the plain one rounds after every operation: numbers of up to 3 by up to 0.01 in each of ten steps.
    expected = trained(lambda p: torch.optim.AdamW(p, lr=1e-2, weight_decay=0.1, foreach=False), dtype)
    got = trained(lambda p: adamw(p, learning_rate=1e-2, weight_decay=0.1), dtype)
    torch.testing.assert_close(got, expected, atol=tolerance, rtol=0)


def test_it_is_fused_where_models_are_put():
    assert adamw([nn.Parameter(torch.ones(1))], learning_rate=1.0, weight_decay=0.0).defaults["fused"]


def test_a_device_without_the_kernel_gets_the_plain_one():
    elsewhere = nn.Parameter(torch.ones(1, device="meta"))
    assert not adamw([elsewhere], learning_rate=1.0, weight_decay=0.0).defaults["fused"]
