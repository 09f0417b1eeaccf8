"""REAP's saliency: router weight times the length of the expert's own output, summed over its tokens."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from families import build, hooks_left, routing_spied, rows, token_ids
from moe_families import tiny_model

from moe_ray.attribution import saliency as module
from moe_ray.attribution.saliency import router_weighted_saliency
from moe_ray.models.moe_layers import find_moe_layers
from moe_ray.models.tokenization import TokenizedRow

ROWS = rows((7, 4), (3, 6), (5, 0))
FAMILIES = ("olmoe", "mixtral", "deepseek_v3", "gpt_oss", "phimoe", "jamba", "dbrx", "granitemoe")


def test_it_is_the_formula_of_the_paper():
    model, row = build("olmoe", dtype=torch.float64), ROWS[0]
    layers = find_moe_layers(model)
    hidden: list[torch.Tensor] = []
    handles = [layer.experts.register_forward_pre_hook(lambda module, args: hidden.append(args[0])) for layer in layers]
    with torch.inference_mode(), routing_spied(model) as calls:
        model(torch.tensor([row.prompt_ids + row.answer_ids]))
    for handle in handles:
        handle.remove()
    expected = np.zeros((3, len(layers), layers.num_experts))
    with torch.inference_mode():
        for number, (layer, x_TH, (index_TK, weights_TK)) in enumerate(zip(layers, hidden, calls, strict=True)):
            for token, (experts, weights) in enumerate(zip(index_TK.tolist(), weights_TK.tolist(), strict=True)):
                for expert, weight in zip(experts, weights, strict=True):
                    gate, up = F.linear(x_TH[token], layer.experts.gate_up_proj[expert]).chunk(2)
                    output = F.linear(F.silu(gate) * up, layer.experts.down_proj[expert])
                    expected[int(token >= len(row.prompt_ids)), number, expert] += weight * float(output.norm())
    np.testing.assert_allclose(router_weighted_saliency(model, [row], pad_id=0)[0], expected, rtol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_rows_are_apart_and_padding_and_pieces_change_nothing(family, monkeypatch):
    model = tiny_model(family)
    together = router_weighted_saliency(model, ROWS, pad_id=0)
    assert (together[2, 1] == 0).all()
    assert (together[:2, :2].sum(axis=3) > 0).all()
    assert (together[:, 2] == 0).all()
    monkeypatch.setattr(module, "_TOKENS_AT_ONCE", 3)
    for row, found in zip(ROWS, together, strict=True):
        np.testing.assert_allclose(router_weighted_saliency(model, [row], pad_id=0)[0], found, rtol=1e-4, atol=1e-6)


def test_tokens_that_are_not_counted_have_no_part():
    model = build("olmoe")
    uncounted = TokenizedRow(ROWS[0].prompt_ids, ROWS[0].answer_ids, [True] * 7 + [False] * 4)
    found, whole = (router_weighted_saliency(model, [row], pad_id=0)[0] for row in (uncounted, ROWS[0]))
    assert (found[1] == 0).all()
    np.testing.assert_array_equal(found[0], whole[0])


def test_logits_are_as_before_and_no_hook_is_left():
    model, ids = build("olmoe"), token_ids(2, 9)
    with torch.inference_mode():
        plain = model(ids).logits
        router_weighted_saliency(model, ROWS, pad_id=0)
        assert torch.equal(model(ids).logits, plain)
    assert hooks_left(model) == 0
