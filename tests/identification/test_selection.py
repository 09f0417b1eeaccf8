"""Selection is by value, and a batch's mask is found by its name."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moe_ray.errors import InputError
from moe_ray.experts import Expert, ExpertMasks, masks_from_experts
from moe_ray.identification.selection import select_unsafe_experts

# Few distinct values, so that ties and values right at a threshold are common.
DIFFERENCES = st.lists(st.integers(-4, 8).map(lambda n: n / 20), min_size=8, max_size=8)
TABLES = st.dictionaries(st.integers(0, 50), DIFFERENCES, min_size=1, max_size=4).filter(
    lambda tables: any(max(values) > 0.2 for values in tables.values())
)


def as_risk(values: dict[int, list[float]]) -> pd.DataFrame:
    """Two layers (decoder layers 1 and 2) of four experts."""
    rows = [
        {"batch_idx": batch, "layer": 1 + i // 4, "expert": i % 4, "risk_diff": value}
        for batch, own in values.items()
        for i, value in enumerate(own)
    ]
    return pd.DataFrame(rows)


def chosen(masks: ExpertMasks) -> dict[int, set[Expert]]:
    return {batch: set(experts) for batch, experts in masks.selected.items()}


@given(TABLES, st.integers(0, 1000))
@settings(deadline=None, max_examples=60)
def test_selection_is_by_value_whatever_the_row_order(tables: dict[int, list[float]], seed: int) -> None:
    risk = as_risk(tables)
    shuffled = risk.sample(frac=1, random_state=seed)
    there, back = (select_unsafe_experts(table, threshold=0.05, top_k=3) for table in (risk, shuffled))
    assert there.selected == back.selected
    np.testing.assert_array_equal(there.masks_BLE, back.masks_BLE)
    for batch, experts in there.selected.items():
        values = {Expert(1 + i // 4, i % 4): value for i, value in enumerate(tables[batch])}
        expected = sorted((e for e, value in values.items() if value > 0.05), key=lambda e: (-values[e], e))[:3]
        assert list(experts) == expected


@given(TABLES, st.sampled_from([-0.1, 0.0, 0.05, 0.1, 0.2]), st.sampled_from([0.0, 0.05, 0.1]))
@settings(deadline=None, max_examples=60)
def test_a_higher_threshold_selects_a_subset(tables: dict[int, list[float]], low: float, rise: float) -> None:
    if max(map(max, tables.values())) <= low + rise:
        return
    wide, narrow = (select_unsafe_experts(as_risk(tables), threshold=low + up, top_k=4) for up in (0.0, rise))
    assert all(chosen(narrow)[batch] <= chosen(wide)[batch] for batch in tables)


@given(TABLES, st.integers(1, 8), st.integers(0, 7))
@settings(deadline=None, max_examples=60)
def test_a_smaller_top_k_selects_a_subset(tables: dict[int, list[float]], small: int, more: int) -> None:
    narrow, wide = (select_unsafe_experts(as_risk(tables), threshold=0.0, top_k=k) for k in (small, small + more))
    assert all(chosen(narrow)[batch] <= chosen(wide)[batch] for batch in tables)


@given(TABLES, st.data())
@settings(deadline=None, max_examples=60)
def test_dropping_a_batch_shifts_no_mask(tables: dict[int, list[float]], data: st.DataObject) -> None:
    dropped = data.draw(st.sampled_from(sorted(tables)))
    rest = {batch: values for batch, values in tables.items() if batch != dropped}
    if not rest or max(map(max, rest.values())) <= 0.05:
        return
    before, after = (select_unsafe_experts(as_risk(values)) for values in (tables, rest))
    for batch in rest:
        np.testing.assert_array_equal(before[batch], after[batch])
    with pytest.raises(InputError, match=f"no mask of batch {dropped}"):
        after[dropped]


def test_a_difference_right_at_the_threshold_is_not_above_it() -> None:
    masks = select_unsafe_experts(as_risk({0: [0.05, 0.1, 0, 0, 0, 0, 0, 0]}), threshold=0.05)
    assert masks.selected[0] == (Expert(1, 1),)


def test_the_largest_are_not_the_first_in_layer_order() -> None:
    masks = select_unsafe_experts(as_risk({0: [0.06, 0.06, 0.06, 0.06, 0.3, 0.2, 0.4, 0.1]}), top_k=3)
    assert masks.selected[0] == (Expert(2, 2), Expert(2, 0), Expert(2, 1))


def test_ties_go_by_layer_then_expert() -> None:
    masks = select_unsafe_experts(as_risk({0: [0, 0, 0.1, 0.1, 0.1, 0, 0, 0]}), top_k=2)
    assert masks.selected[0] == (Expert(1, 2), Expert(1, 3))


def test_union_layers_and_digest_follow_the_masks() -> None:
    masks = masks_from_experts({4: [Expert(1, 0)], 2: [Expert(1, 0), Expert(2, 3)]}, layers=[1, 2], num_experts=4)
    assert masks.union_experts == (Expert(1, 0), Expert(2, 3))
    assert masks.empty_layers(4) == (2,)
    assert masks.short_layers(2, 2) == (1, 2)
    other = masks_from_experts({4: [Expert(1, 0)], 2: [Expert(2, 3)]}, layers=[1, 2], num_experts=4)
    assert masks.digest() != other.digest()


def test_an_empty_selection_is_an_error_that_says_what_to_lower() -> None:
    with pytest.raises(InputError, match=r"the largest is 0\.0400; lower identify.threshold"):
        select_unsafe_experts(as_risk({0: [0.04, 0, 0, 0, 0, 0, 0, 0]}))


def test_an_expert_outside_the_model_is_an_error() -> None:
    with pytest.raises(InputError, match="batch 0: expert L07_E00 is outside layers"):
        masks_from_experts({0: [Expert(7, 0)]}, layers=[1, 2], num_experts=4)
