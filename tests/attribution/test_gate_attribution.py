"""Gate attribution is the derivative by each row's own gates, and leaves the model as it was."""

from __future__ import annotations

from contextlib import contextmanager

import numpy as np
import pytest
import torch
from families import build, hooks_left, rows, token_ids
from moe_families import tiny_model

from moe_ray.attribution.gate_attribution import gate_attribution
from moe_ray.errors import InputError
from moe_ray.models.loss import answer_loss
from moe_ray.models.moe_layers import find_moe_layers

ROWS = rows((7, 4), (3, 6), (5, 2))
FAMILIES = ("olmoe", "mixtral", "deepseek_v3", "gpt_oss", "phimoe", "jamba", "qwen3_moe", "dbrx", "granitemoe")


@contextmanager
def gates_are(model, gates_LE):
    """Every routing weight times a gate, by replacing `forward`: none of the code that is tested."""
    layers = find_moe_layers(model)
    for number, layer in enumerate(layers):

        def gated(hidden, index, weights, *rest, number=number, original=layer.experts.forward):
            return original(hidden, index, weights * gates_LE[number][index].to(weights.dtype), *rest)

        layer.experts.forward = gated
    try:
        yield
    finally:
        for layer in layers:
            del layer.experts.forward


def by_differences(model, row, gates, experts, step) -> np.ndarray:
    """(experts, 2) what a step up and a step down of each gate do to the loss, per step."""
    layers = find_moe_layers(model)

    def loss(layer, expert, change):
        gates_LE = torch.full((len(layers), layers.num_experts), gates, dtype=torch.float64)
        gates_LE[layer, expert] += change
        with gates_are(model, gates_LE), torch.inference_mode():
            return float(answer_loss(model, [row], pad_id=0)[0]) / len(row.answer_ids)

    losses = np.array([[loss(*at, change) for change in (step, 0, -step)] for at in experts])
    return -np.stack([losses[:, 0] - losses[:, 1], losses[:, 1] - losses[:, 2]], axis=1) / step


@pytest.mark.parametrize("gates", [0.5, 1.0])
@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_it_is_what_a_small_change_of_one_gate_does_to_the_loss_of_the_row(family, gates):
    model = tiny_model(family)
    found_BLE = gate_attribution(model, ROWS, pad_id=0, gates=gates)
    assert found_BLE.shape == (3, len(find_moe_layers(model)), 8)
    for row, found_LE in zip(ROWS, found_BLE, strict=True):
        largest = np.argsort(-np.abs(found_LE).ravel())[:3]
        experts = [divmod(int(index), found_LE.shape[1]) for index in largest]
        expected = by_differences(model, row, gates, experts, step=1e-4)
        # Where a router is all but undecided, a step one way changes its choice; none does so both ways. The loss is in
        # single precision, and a difference keeps its rounding.
        errors = np.abs(expected - np.array([[found_LE[at]] for at in experts])).min(axis=1)
        assert (errors < 0.02 * np.abs(expected).max(axis=1) + 0.02).all()


def test_rows_that_share_a_pass_have_what_they_have_alone():
    model = build("olmoe", dtype=torch.float64)
    together_BLE = gate_attribution(model, ROWS, pad_id=0)
    for row, together_LE in zip(ROWS, together_BLE, strict=True):
        np.testing.assert_allclose(gate_attribution(model, [row], pad_id=0)[0], together_LE, rtol=1e-4, atol=1e-6)


def test_logits_and_flags_are_as_before_and_no_hook_is_left():
    model, ids = build("olmoe"), token_ids(2, 9)
    with torch.inference_mode():
        plain = model(ids).logits
    gate_attribution(model, ROWS, pad_id=0)
    assert hooks_left(model) == 0
    assert all(p.requires_grad and p.grad is None for p in model.parameters())
    with torch.inference_mode():
        assert torch.equal(model(ids).logits, plain)


def test_products_of_all_experts_at_once_give_the_same():
    model = build("olmoe")
    expected = gate_attribution(model, ROWS, pad_id=0)
    model.config._experts_implementation = "grouped_mm"
    np.testing.assert_allclose(gate_attribution(model, ROWS, pad_id=0), expected, rtol=1e-3, atol=1e-5)


def test_it_runs_in_bfloat16():
    single, half = build("olmoe"), build("olmoe", dtype=torch.bfloat16)
    full, rounded = (gate_attribution(model, ROWS, pad_id=0).ravel() for model in (single, half))
    assert np.corrcoef(full, rounded)[0, 1] > 0.9


def test_an_experts_module_that_gets_a_part_of_the_tokens_is_refused():
    model = build("olmoe")
    experts = find_moe_layers(model)[0].experts
    experts.register_forward_pre_hook(lambda module, args: tuple(arg[:-1] for arg in args))
    with pytest.raises(InputError, match="routes a part of the tokens only"):
        gate_attribution(model, ROWS, pad_id=0)
