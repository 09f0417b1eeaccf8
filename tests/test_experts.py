"""Masks are found by their batch, and say in a line and a table what they hold."""

from __future__ import annotations

import numpy as np
import pytest

from moe_ray.errors import InputError
from moe_ray.experts import Expert, mask_to_experts, masks_from_experts, router_mask


def test_union_layers_and_digest_follow_the_masks() -> None:
    masks = masks_from_experts({4: [Expert(1, 0)], 2: [Expert(1, 0), Expert(2, 3)]}, layers=[1, 2], num_experts=4)
    assert masks.union_experts == (Expert(1, 0), Expert(2, 3))
    assert masks.empty_layers(4) == (2,)
    assert masks.short_layers(2, 2) == (1, 2)
    other = masks_from_experts({4: [Expert(1, 0)], 2: [Expert(2, 3)]}, layers=[1, 2], num_experts=4)
    assert masks.digest() != other.digest()


def test_an_expert_outside_the_model_is_an_error() -> None:
    with pytest.raises(InputError, match="batch 0: expert L07_E00 is outside layers"):
        masks_from_experts({0: [Expert(7, 0)]}, layers=[1, 2], num_experts=4)


def test_masks_print_as_one_line():
    masks = masks_from_experts({4: [Expert(1, 0)], 2: [Expert(1, 0), Expert(2, 3)]}, layers=[1, 2], num_experts=4)
    assert repr(masks) == "ExpertMasks(2 batches, 2x4, union 2)"


def test_a_table_of_masks_has_a_row_per_batch_and_expert_the_strongest_first():
    masks = masks_from_experts(
        {4: [Expert(2, 3), Expert(1, 0)], 2: [], 7: [Expert(2, 3)]}, layers=[1, 2], num_experts=4
    )
    table = masks.to_frame()
    assert table.columns.tolist() == ["batch_idx", "layer", "expert", "name"]
    assert table["batch_idx"].tolist() == [4, 4, 7]
    assert table["name"].tolist() == ["L02_E03", "L01_E00", "L02_E03"]
    assert masks_from_experts({1: []}, layers=[1], num_experts=2).to_frame().empty


def test_a_mask_is_that_of_its_batch_whatever_the_order():
    selected = {batch: [Expert(0, batch % 5)] for batch in np.random.default_rng(0).permutation(40).tolist()}
    masks = masks_from_experts(selected, layers=[0], num_experts=5)
    for batch, experts in selected.items():
        assert mask_to_experts(masks[batch], masks.layers) == tuple(experts)
    with pytest.raises(InputError, match="no mask of batch 40"):
        masks[40]


def test_the_router_mask_leaves_short_layers_unrestricted_where_that_is_asked_for():
    mask_LE = np.array([[True, False, False], [True, True, False], [False, False, False]])
    kept = router_mask(mask_LE, num_experts_per_tok=2, short_layers="allowed_only")
    assert np.array_equal(kept, mask_LE)
    freed = router_mask(mask_LE, num_experts_per_tok=2, short_layers="natural")
    assert freed.tolist() == [[False] * 3, [True, True, False], [False] * 3]
