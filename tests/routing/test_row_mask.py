"""Rows of one forward pass with masks of their own are routed as each would be alone (invariants 7 to 9)."""

from __future__ import annotations

import copy
from functools import partial

import numpy as np
import pytest
import torch
from families import NUM_EXPERTS, SOME_FAMILIES, build, hooks_left, mask, routing_spied, shared, token_ids
from masked_models import LOGIT_TOLERANCE, MASKS, mask_named, without_disallowed

from moe_ray.errors import InputError
from moe_ray.models.moe_layers import find_moe_layers
from moe_ray.models.tokenization import TokenizedRow, pad_rows
from moe_ray.routing.masking import route_rows_through, route_through

ALL, NONE = "all", "none"
NAMES = (*MASKS, ALL, NONE)
IDS = token_ids(len(NAMES), 9)
LENGTHS = (9, 2, 5, 1, 7, 3, 9, 4)


def masks_named(model, names=NAMES):
    """(B, L, E) masks of the rows."""
    experts = {ALL: (range(NUM_EXPERTS),) * 2, NONE: ((), ())}
    return np.stack([mask(model, *experts[name]) if name in experts else mask_named(model, name) for name in names])


def alone(model, ids, mask_LE):
    """Logits of one row in a pass of its own, under its mask."""
    if not mask_LE.any():
        return model(ids[None]).logits[0]
    with route_through(model, mask_LE):
        return model(ids[None]).logits[0]


def weights_by_expert(calls, num_rows):
    """Per layer the (B, S, E) weight of each expert for each position; 0 where it was not chosen."""
    return [
        torch.zeros(len(index), NUM_EXPERTS).scatter_add_(1, index, weights).view(num_rows, -1, NUM_EXPERTS)
        for index, weights in calls
    ]


@pytest.mark.parametrize("family", SOME_FAMILIES)
def test_a_rows_output_equals_a_model_without_the_experts_that_its_mask_disallows(family):
    model = shared(family)
    masks_BLE = masks_named(model)
    with route_rows_through(model, masks_BLE):
        together = model(IDS).logits
    for row, mask_LE in enumerate(masks_BLE):
        expected = without_disallowed(model, mask_LE)(IDS[row : row + 1]).logits[0]
        torch.testing.assert_close(together[row], expected, atol=LOGIT_TOLERANCE, rtol=0)


@pytest.mark.parametrize("family", SOME_FAMILIES)
def test_one_pass_routes_as_a_pass_for_each_mask(family):
    model = shared(family)
    masks_BLE = masks_named(model)
    with routing_spied(model) as calls, route_rows_through(model, masks_BLE):
        model(IDS)
    together = weights_by_expert(calls, len(IDS))
    for row, mask_LE in enumerate(masks_BLE):
        with routing_spied(model) as calls:
            alone(model, IDS[row], mask_LE)
        for layer, weights_1SE in enumerate(weights_by_expert(calls, 1)):
            torch.testing.assert_close(together[layer][row], weights_1SE[0], atol=1e-5, rtol=0)


@pytest.mark.parametrize("family", SOME_FAMILIES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_no_token_reaches_an_expert_that_its_rows_mask_disallows(family, dtype):
    model = shared(family, dtype)
    masks_BLE = masks_named(model)
    with routing_spied(model) as calls, route_rows_through(model, masks_BLE):
        assert model(IDS).logits.isfinite().all()
    for layer, (index_TK, _) in enumerate(calls):
        for allowed_E, index in zip(masks_BLE[:, layer], index_TK.view(len(IDS), -1), strict=True):
            assert torch.as_tensor(allowed_E if allowed_E.any() else ~allowed_E)[index].all()


@pytest.mark.parametrize("family", SOME_FAMILIES)
def test_rows_do_not_influence_one_another(family):
    model = shared(family)
    with route_rows_through(model, masks_named(model)):
        first = model(IDS).logits
    order = [3, 5, 0, 7, 1, 6, 2, 4]
    names = [NAMES[row] for row in order]
    with route_rows_through(model, masks_named(model, names)):
        turned = model(IDS[order]).logits
    torch.testing.assert_close(turned, first[order], atol=LOGIT_TOLERANCE, rtol=0)
    # Other prompts under other masks beside the first row.
    ids = torch.cat([IDS[:1], token_ids(len(IDS) - 1, 9, seed=5)])
    with route_rows_through(model, masks_named(model, [NAMES[0], *reversed(NAMES[1:])])):
        beside_others = model(ids).logits
    torch.testing.assert_close(beside_others[0], first[0], atol=LOGIT_TOLERANCE, rtol=0)
    assert (beside_others[1:] - first[1:]).abs().amax() > 100 * LOGIT_TOLERANCE


@pytest.mark.slow
@pytest.mark.parametrize("left", [False, True])
@pytest.mark.parametrize("family", SOME_FAMILIES)
def test_padding_changes_no_rows_output(family, left):
    model = shared(family)
    masks_BLE = masks_named(model)
    padded = pad_rows(
        [TokenizedRow(ids[:length].tolist(), []) for ids, length in zip(IDS, LENGTHS, strict=True)], pad_id=0, left=left
    )
    positions_BS = (padded.attention_mask_BS.cumsum(dim=1) - 1).clamp_min(0)
    positions = {} if family == "jamba" else {"position_ids": positions_BS}
    with route_rows_through(model, masks_BLE):
        together = model(input_ids=padded.input_ids_BS, attention_mask=padded.attention_mask_BS, **positions).logits
    for row, length in enumerate(LENGTHS):
        expected = alone(model, IDS[row, :length], masks_BLE[row])
        got = together[row][padded.attention_mask_BS[row].bool()]
        torch.testing.assert_close(got, expected, atol=LOGIT_TOLERANCE, rtol=0)


@pytest.mark.slow
@pytest.mark.parametrize("family", SOME_FAMILIES)
def test_generated_tokens_are_those_of_one_generate_for_each_mask(family):
    model = shared(family)
    masks_BLE = masks_named(model)
    padded = pad_rows(
        [TokenizedRow(ids[:length].tolist(), []) for ids, length in zip(IDS, LENGTHS, strict=True)], pad_id=0, left=True
    )
    settings = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    with route_rows_through(model, masks_BLE):
        together = model.generate(padded.input_ids_BS, attention_mask=padded.attention_mask_BS, **settings)[:, -5:]
    for row, (length, mask_LE) in enumerate(zip(LENGTHS, masks_BLE, strict=True)):
        through = mask_LE if mask_LE.any() else np.ones_like(mask_LE)
        with route_through(model, through):
            expected = model.generate(IDS[row : row + 1, :length], **settings)[0, length:]
        assert torch.equal(together[row], expected)
    assert len({tuple(row) for row in together.tolist()}) > 1


def test_a_tokens_list_is_as_long_as_the_row_with_the_most_allowed_experts_needs():
    model = shared("olmoe")  # A token uses three experts.
    masks_BLE = np.stack([mask(model, (2,), (4,)), mask(model, (2, 6), (4,))])
    with routing_spied(model) as calls, route_rows_through(model, masks_BLE):
        model(IDS[:2])
    (first, weights), (second, _) = calls
    assert [first.shape[1], second.shape[1]] == [2, 1]
    assert (first[:9] == 2).all()
    assert torch.equal(weights[:9].count_nonzero(dim=1), torch.ones(9, dtype=torch.long))


# Masks that are in force at some positions only

PLACES = np.random.default_rng(0).random(IDS.shape) < 0.5


def masked_in_places(model, masks_BLE, positions_BS):
    """A model whose blocks run whole and, for each row, without what its mask disallows; each position takes its own."""
    cut = [without_disallowed(model, mask_LE) for mask_LE in masks_BLE]
    oracle = copy.deepcopy(model)
    for layer in find_moe_layers(oracle):
        cut_blocks = [other.get_submodule(layer.name.rpartition(".")[0]) for other in cut]
        layer.block.forward = partial(block_in_places, type(layer.block).forward, layer.block, cut_blocks, positions_BS)
    return oracle


def block_in_places(forward, block, cut_blocks, positions_BS, hidden_BSH, *args, **kwargs):
    natural = forward(block, hidden_BSH, *args, **kwargs)
    masked = [other(hidden_BSH[row : row + 1], *args, **kwargs) for row, other in enumerate(cut_blocks)]
    is_masked_BS1 = torch.as_tensor(positions_BS).unsqueeze(2)
    if isinstance(natural, tuple):
        masked_BSH = torch.cat([output[0] for output in masked])
        return torch.where(is_masked_BS1, masked_BSH.view_as(natural[0]), natural[0]), *natural[1:]
    return torch.where(is_masked_BS1, torch.cat(masked).view_as(natural), natural)


@pytest.mark.slow
@pytest.mark.parametrize("family", SOME_FAMILIES)
def test_where_a_mask_is_in_force_the_output_is_that_without_its_experts_and_elsewhere_the_models_own(family):
    model = shared(family)
    masks_BLE = masks_named(model)
    expected = masked_in_places(model, masks_BLE, PLACES)(IDS).logits
    with route_rows_through(model, masks_BLE, PLACES):
        logits = model(IDS).logits
    torch.testing.assert_close(logits, expected, atol=LOGIT_TOLERANCE, rtol=0)
    with route_rows_through(model, masks_BLE):
        everywhere = model(IDS).logits
    assert (everywhere - logits).abs().amax() > 100 * LOGIT_TOLERANCE


@pytest.mark.parametrize("family", SOME_FAMILIES)
def test_masks_in_force_at_every_position_are_masks_of_rows_and_at_none_nothing(family):
    model = shared(family)
    masks_BLE = masks_named(model)
    with route_rows_through(model, masks_BLE):
        of_rows = model(IDS).logits
    for positions, expected in ((np.ones_like(PLACES), of_rows), (np.zeros_like(PLACES), model(IDS).logits)):
        with route_rows_through(model, masks_BLE, positions):
            torch.testing.assert_close(model(IDS).logits, expected, atol=LOGIT_TOLERANCE, rtol=0)


@pytest.mark.parametrize("family", SOME_FAMILIES)
def test_masks_at_positions_restrict_the_tokens_there_and_no_others(family):
    model = shared(family)
    masks_BLE = np.stack([mask_named(model, "exactly k")] * len(IDS))
    with routing_spied(model) as calls, route_rows_through(model, masks_BLE, PLACES):
        model(IDS)
    with routing_spied(model) as natural:
        model(IDS)
    for layer, (index_TK, weights_TK) in enumerate(calls):
        is_allowed = torch.as_tensor(masks_BLE[0, layer])[index_TK] | (weights_TK == 0)
        assert is_allowed[PLACES.ravel()].all()
        assert not is_allowed[~PLACES.ravel()].all()
    # Nothing before the first MoE layer differs, so that tokens elsewhere make the very same choices in it.
    for got, own in zip(calls[0], natural[0], strict=True):
        assert torch.equal(got[~PLACES.ravel()], own[~PLACES.ravel()])


# Invariant 17


@pytest.mark.parametrize("num_rows", [1, 4, 16])
def test_a_pass_of_other_rows_than_there_are_masks_is_refused(num_rows):
    model = build("olmoe")
    with (
        pytest.raises(InputError, match=f"a forward pass of {num_rows} rows under the masks of 8 rows"),
        route_rows_through(model, masks_named(model)),
    ):
        model(token_ids(num_rows, 4))
    assert hooks_left(model) == 0


def test_a_layer_that_receives_a_part_of_the_tokens_is_refused():
    model = build("olmoe")
    block = find_moe_layers(model)[1].block
    whole = block.forward
    block.forward = lambda hidden: whole(hidden[:, ::2].contiguous())
    with (
        pytest.raises(InputError, match=r"got 40 tokens in a forward pass of 72 \(rows x positions\)"),
        route_rows_through(model, masks_named(model)),
    ):
        model(IDS)
    del block.forward
    assert hooks_left(model) == 0


def test_a_pass_of_other_positions_than_masks_are_in_force_at_is_refused():
    model = build("olmoe")
    with (
        pytest.raises(InputError, match="a forward pass of 4 positions under masks that are in force at some of 9"),
        route_rows_through(model, masks_named(model), PLACES),
    ):
        model(IDS[:, :4])
    assert hooks_left(model) == 0


def test_positions_of_other_rows_than_there_are_masks_are_refused():
    model = shared("olmoe")
    with (
        pytest.raises(InputError, match="got those of 3 rows, expected one row for each of 8 masks"),
        route_rows_through(model, masks_named(model), PLACES[:3]),
    ):
        pass


def test_one_mask_where_there_should_be_one_a_row_is_refused():
    model = shared("olmoe")
    with pytest.raises(InputError, match="expert mask of a row"), route_rows_through(model, masks_named(model)[0]):
        pass


def test_masks_of_rows_where_there_should_be_one_are_refused():
    model = shared("olmoe")
    with pytest.raises(InputError, match=r"got shape \(8, 2, 8\)"), route_through(model, masks_named(model)):
        pass


@pytest.mark.parametrize("outer_is_of_rows", [True, False])
def test_masks_inside_another_mask_are_refused(outer_is_of_rows):
    model = build("olmoe")
    of_rows = route_rows_through(model, masks_named(model))
    of_all = route_through(model, mask_named(model, "exactly k"))
    outer, inner = (of_rows, of_all) if outer_is_of_rows else (of_all, of_rows)
    with pytest.raises(InputError, match="another expert mask is in force"), outer, inner:
        pass
    assert hooks_left(model) == 0


def test_a_router_that_does_something_else_than_add_its_bias_is_refused(monkeypatch):
    model = build("deepseek_v3")
    router = find_moe_layers(model)[0].router
    natural = type(router).forward

    def forward(hidden):
        assert (router.e_score_correction_bias * 2).isfinite().all()
        return natural(router, hidden)

    monkeypatch.setattr(router, "forward", forward)
    with (
        pytest.raises(InputError, match="its router does mul with the bias that it selects experts by"),
        route_rows_through(model, masks_named(model)),
    ):
        model(IDS)
    assert hooks_left(model) == 0
