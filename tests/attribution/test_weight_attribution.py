"""Weight attribution is exact, leaves the model as it was, and holds no more than one expert's gradient."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from families import build, hooks_left, rows, state_of, token_ids
from moe_families import causal_moe_families, tiny_model

from moe_ray.attribution import weight_attribution as module
from moe_ray.attribution.weight_attribution import weight_attribution
from moe_ray.errors import InputError
from moe_ray.models.loss import answer_loss
from moe_ray.models.moe_layers import find_moe_layers
from moe_ray.models.tokenization import TokenizedRow

ROW, OTHER = rows((7, 4), (3, 6))
REFUSED = ("doge", "jetmoe", "llama4", "llama4_text", "longcat_flash", "zaya")
"""Families without experts that moe-ray can read, see `tests/routing/test_all_families.py`."""
WITHOUT_SLICES = ("dbrx",)
"""Families whose experts have no slice each."""
QUICK = ("olmoe", "mixtral", "deepseek_v3", "gpt_oss", "phimoe", "jamba", "qwen3_moe")

FAMILIES = sorted(set(causal_moe_families()) - set(REFUSED))


def of_the_whole_gradient(model, row) -> np.ndarray:
    """(L, E) by torch.autograd over the full fused tensors, or over the experts' modules."""
    layers = find_moe_layers(model)
    found = np.zeros((len(layers), layers.num_experts))
    tensors = [
        (number, expert, tensor)
        for number, layer in enumerate(layers)
        for expert, tensor in (
            [(e, p) for e, module in enumerate(layer.expert_modules()) for p in module.parameters()]
            or [(None, tensor) for tensor in layer.expert_tensors().values()]
        )
    ]
    for _, _, tensor in tensors:
        tensor.requires_grad_(True)
    with torch.enable_grad():
        loss = answer_loss(model, [row], pad_id=0)[0] / len(row.answer_ids)
        gradients = torch.autograd.grad(loss, [tensor for *_, tensor in tensors], allow_unused=True)
    for (number, expert, tensor), gradient in zip(tensors, gradients, strict=True):
        if gradient is not None:
            product = (tensor.detach() * gradient).abs().double()
            if expert is None:
                found[number] += product.flatten(1).sum(dim=1).numpy()
            else:
                found[number, expert] += float(product.sum())
    return found


@pytest.mark.parametrize(
    "family", [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in FAMILIES]
)
def test_it_is_that_of_the_whole_gradient_of_one_prompt(family):
    model = tiny_model(family)
    if family in WITHOUT_SLICES:
        with pytest.raises(InputError, match="has no tensors with one slice per expert"):
            weight_attribution(model, ROW, pad_id=0)
        return
    expected = of_the_whole_gradient(model, ROW)
    np.testing.assert_allclose(weight_attribution(model, ROW, pad_id=0), expected, rtol=1e-4, atol=1e-8)
    assert (expected > 0).any(axis=1).all()


def test_a_model_that_asks_for_gradients_gets_none_and_is_as_it_was():
    model, ids = build("olmoe"), token_ids(2, 9)
    model.requires_grad_(True)
    model.lm_head.weight.requires_grad_(False)
    before, wants = state_of(model), {name: p.requires_grad for name, p in model.named_parameters()}
    with torch.inference_mode():
        plain = model(ids).logits
    weight_attribution(model, ROW, pad_id=0)
    assert hooks_left(model) == 0
    assert {name: p.requires_grad for name, p in model.named_parameters()} == wants
    assert all(parameter.grad is None for parameter in model.parameters())
    assert all(torch.equal(tensor, before[name]) for name, tensor in state_of(model).items())
    with torch.inference_mode():
        assert torch.equal(model(ids).logits, plain)


def test_nothing_is_left_behind_after_an_error(monkeypatch):
    model = build("olmoe")
    monkeypatch.setattr(module, "answer_loss", lambda *args, **kwargs: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        weight_attribution(model, ROW, pad_id=0)
    assert hooks_left(model) == 0
    assert all(parameter.requires_grad for parameter in model.parameters())


@pytest.mark.parametrize("implementation", ["grouped_mm", "batched_mm"])
def test_products_of_all_experts_at_once_are_put_off_meanwhile(implementation):
    model = build("olmoe")
    expected = weight_attribution(model, ROW, pad_id=0)
    model.config._experts_implementation = implementation
    np.testing.assert_array_equal(weight_attribution(model, ROW, pad_id=0), expected)
    assert model.config._experts_implementation == implementation


def test_no_gradient_is_larger_than_one_expert(monkeypatch):
    model, sizes = build("olmoe"), []
    largest = max(t[0].numel() for layer in find_moe_layers(model) for t in layer.expert_tensors().values())
    backward = module._Tap.backward
    monkeypatch.setattr(
        module._Tap, "backward", staticmethod(lambda ctx, g: (sizes.append(g.numel()), backward(ctx, g))[1])
    )
    stack = torch.stack
    monkeypatch.setattr(
        torch, "stack", lambda tensors, *args: pytest.fail("stacked") if tensors[0].ndim > 1 else stack(tensors, *args)
    )
    weight_attribution(model, ROW, pad_id=0)
    assert len(sizes) > 4
    assert max(sizes) == largest


def test_a_slice_that_is_taken_twice_is_one_gradient_and_not_two():
    fused, sums_E = torch.tensor([[2.0, 3.0]]), torch.zeros(1)
    anchor = torch.zeros((), requires_grad=True)
    slices = module._Slices(fused, anchor, sums_E)
    loss = (slices[0] * torch.tensor([1.0, 1.0])).sum() - (slices[0] * torch.tensor([1.0, 2.0])).sum()
    torch.autograd.grad(loss, anchor, allow_unused=True)
    assert sums_E.tolist() == [3.0]  # not 2 + 3 + 2 + 6


def test_an_expert_without_tokens_has_nothing_and_the_loss_is_per_token():
    model = build("olmoe")
    found_LE = weight_attribution(model, ROW, pad_id=0)
    assert (found_LE == 0).any()
    assert found_LE.max() > 0
    longer = TokenizedRow(ROW.prompt_ids, ROW.answer_ids * 4)
    assert weight_attribution(model, longer, pad_id=0).max() < 4 * found_LE.max()


def test_bfloat16_gives_nearly_the_same():
    single, half = build("olmoe"), build("olmoe", dtype=torch.bfloat16)
    full_LE, half_LE = (weight_attribution(model, OTHER, pad_id=0) for model in (single, half))
    assert np.corrcoef(full_LE.ravel(), half_LE.ravel())[0, 1] > 0.9
