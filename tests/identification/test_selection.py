"""Selection is by value, each rule does what its source says, and filters only take experts away."""

from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from prompt_tokens import by_prompt_tokens

from moe_ray.errors import InputError
from moe_ray.experts import Expert, ExpertMasks
from moe_ray.identification.selection import RULES, select, unsafe_experts

# Few distinct values, so that ties and values right at a threshold are common.
DIFFERENCES = st.lists(st.integers(-4, 8).map(lambda n: n / 20), min_size=8, max_size=8)
TABLES = st.dictionaries(st.integers(0, 50), DIFFERENCES, min_size=1, max_size=4).filter(
    lambda tables: any(max(values) > 0.2 for values in tables.values())
)


def as_risk(values: dict[int, list[float]]) -> pd.DataFrame:
    """Two layers (decoder layers 1 and 2) of four experts."""
    rows = [
        {"batch_idx": batch, "layer": 1 + i // 4, "expert": i % 4, "risk_diff": value}
        for batch, differences in values.items()
        for i, value in enumerate(differences)
    ]
    return pd.DataFrame(rows)


def chosen(masks: ExpertMasks) -> dict[int, set[Expert]]:
    return {batch: set(experts) for batch, experts in masks.selected.items()}


@pytest.mark.slow
@given(TABLES, st.integers(0, 1000))
@settings(max_examples=60)
def test_selection_is_by_value_whatever_the_row_order(tables: dict[int, list[float]], seed: int) -> None:
    risk = as_risk(tables)
    shuffled = risk.sample(frac=1, random_state=seed)
    there, back = (select(table, by_prompt_tokens(top_k=3)) for table in (risk, shuffled))
    assert there.selected == back.selected
    np.testing.assert_array_equal(there.masks_BLE, back.masks_BLE)
    for batch, experts in there.selected.items():
        values = {Expert(1 + i // 4, i % 4): value for i, value in enumerate(tables[batch])}
        expected = sorted((e for e, value in values.items() if value > 0.05), key=lambda e: (-values[e], e))[:3]
        assert list(experts) == expected


@pytest.mark.slow
@given(TABLES, st.sampled_from([-0.1, 0.0, 0.05, 0.1, 0.2]), st.sampled_from([0.0, 0.05, 0.1]))
@settings(max_examples=60)
def test_a_higher_threshold_selects_a_subset(tables: dict[int, list[float]], low: float, rise: float) -> None:
    if max(map(max, tables.values())) <= low + rise:
        return
    wide, narrow = (select(as_risk(tables), by_prompt_tokens(threshold=low + up, top_k=4)) for up in (0.0, rise))
    assert all(chosen(narrow)[batch] <= chosen(wide)[batch] for batch in tables)


@pytest.mark.slow
@given(TABLES, st.integers(1, 8), st.integers(0, 7))
@settings(max_examples=60)
def test_a_smaller_top_k_selects_a_subset(tables: dict[int, list[float]], small: int, more: int) -> None:
    narrow, wide = (select(as_risk(tables), by_prompt_tokens(threshold=0.0, top_k=k)) for k in (small, small + more))
    assert all(chosen(narrow)[batch] <= chosen(wide)[batch] for batch in tables)


@pytest.mark.slow
@given(TABLES, st.data())
@settings(max_examples=60)
def test_dropping_a_batch_shifts_no_mask(tables: dict[int, list[float]], data: st.DataObject) -> None:
    dropped = data.draw(st.sampled_from(sorted(tables)))
    rest = {batch: values for batch, values in tables.items() if batch != dropped}
    if not rest or max(map(max, rest.values())) <= 0.05:
        return
    before, after = (select(as_risk(values), by_prompt_tokens()) for values in (tables, rest))
    for batch in rest:
        np.testing.assert_array_equal(before[batch], after[batch])
    with pytest.raises(InputError, match=f"no mask of batch {dropped}"):
        after[dropped]


def test_a_difference_right_at_the_threshold_is_not_above_it() -> None:
    masks = select(as_risk({0: [0.05, 0.1, 0, 0, 0, 0, 0, 0]}), by_prompt_tokens(threshold=0.05))
    assert masks.selected[0] == (Expert(1, 1),)


def test_the_largest_are_not_the_first_in_layer_order() -> None:
    masks = select(as_risk({0: [0.06, 0.06, 0.06, 0.06, 0.3, 0.2, 0.4, 0.1]}), by_prompt_tokens(top_k=3))
    assert masks.selected[0] == (Expert(2, 2), Expert(2, 0), Expert(2, 1))


def test_ties_go_by_layer_then_expert() -> None:
    masks = select(as_risk({0: [0, 0, 0.1, 0.1, 0.1, 0, 0, 0]}), by_prompt_tokens(top_k=2))
    assert masks.selected[0] == (Expert(1, 2), Expert(1, 3))


def test_an_empty_selection_is_an_error_that_says_what_to_lower() -> None:
    with pytest.raises(InputError, match=r"the largest is 0\.0400; lower identify.threshold"):
        select(as_risk({0: [0.04, 0, 0, 0, 0, 0, 0, 0]}), by_prompt_tokens())


# Rules and filters


def table_of(batch_idx: int = 0, **columns: list[float]) -> pd.DataFrame:
    """A batch's risk table: layers 1 and 2 of three experts each."""
    base = {"batch_idx": [batch_idx] * 6, "layer": [1, 1, 1, 2, 2, 2], "expert": [0, 1, 2] * 2}
    return pd.DataFrame({**base, **columns})


RISK = table_of(
    risk_diff=[0.3, 0.2, 0.1, 0.25, 0.01, -0.2],
    risk_diff_prompt=[0.0, 0.2, 0.3, 0.1, 0.4, 0.0],
    a_unsafe=[50, 30, 20, 10, 10, 80],
    w_unsafe=[1.0, 8.0, 1.0, 5.0, 5.0, 0.0],
    p=[0.001, 0.2, 0.001, 0.001, 0.5, 1.0],
    p_maxt=[0.01, 0.9, 0.2, 0.05, 1.0, 1.0],
    q=[0.002, 0.3, 0.002, 0.002, 0.6, 1.0],
    stability=[1.0, 0.9, 0.4, 0.8, 0.1, 0.0],
)


def names(**setting: Any) -> list[str]:
    return [str(expert) for expert in unsafe_experts(RISK, by_prompt_tokens(**setting), seed=1)]


def test_risk_diff_is_the_plain_method() -> None:
    assert names() == ["L01_E00", "L02_E00", "L01_E01", "L01_E02"]
    assert names(threshold=0.2) == ["L01_E00", "L02_E00"]
    assert names(top_k=1) == ["L01_E00"]


def test_weighting_prompts_ranks_by_equal_weight_per_prompt() -> None:
    assert names(weighting="prompts", top_k=2) == ["L02_E01", "L01_E02"]


def test_per_layer_gives_every_layer_its_quota() -> None:
    assert names(rule="per_layer", per_layer_quota=1) == ["L01_E00", "L02_E00"]
    assert names(rule="per_layer", per_layer_quota=2) == ["L01_E00", "L02_E00", "L01_E01"]


def test_esft_token_covers_top_p_of_each_layers_tokens_with_the_fewest_experts() -> None:
    assert names(rule="esft_token", top_p=0.5) == ["L02_E02", "L01_E00"]
    assert names(rule="esft_token", top_p=0.8) == ["L02_E02", "L01_E00", "L01_E01"]


def test_esft_gate_covers_top_p_of_each_layers_weight() -> None:
    assert names(rule="esft_gate", top_p=0.8) == ["L01_E01", "L02_E00", "L02_E01"]
    assert names(rule="esft_gate", top_p=1.0) == ["L01_E01", "L02_E00", "L02_E01", "L01_E00", "L01_E02"]


def test_random_matches_the_number_per_layer_and_is_seeded() -> None:
    big = pd.concat(
        [
            pd.DataFrame({"batch_idx": batch, "layer": n, "expert": range(30), "risk_diff": np.linspace(-1, 0.1 * n, 30)})
            for batch in (0, 1)
            for n in (1, 2, 3)
        ]
    )  # fmt: skip
    plain = select(big, by_prompt_tokens(rule="risk_diff"))
    drawn = select(big, by_prompt_tokens(rule="random"), seed=4)
    for batch in (0, 1):
        per_layer = [Counter(expert.layer for expert in masks.selected[batch]) for masks in (plain, drawn)]
        assert per_layer[0] == per_layer[1]
    assert drawn.selected[0] != drawn.selected[1]
    assert drawn.digest() == select(big, by_prompt_tokens(rule="random"), seed=4).digest()
    assert drawn.digest() != select(big, by_prompt_tokens(rule="random"), seed=5).digest()


@pytest.mark.parametrize(
    ("correction", "expected"),
    [
        ("maxt", ["L01_E00", "L02_E00"]),
        ("bh", ["L01_E00", "L02_E00", "L01_E02"]),
        ("none", ["L01_E00", "L02_E00", "L01_E02"]),
    ],
)
def test_alpha_holds_the_chosen_p_against_its_level(correction: str, expected: list[str]) -> None:
    assert names(alpha=0.05, correction=correction) == expected


def test_stability_drops_experts_that_hang_on_single_prompts() -> None:
    assert names(stability=0.8) == ["L01_E00", "L02_E00", "L01_E01"]


@given(
    st.lists(st.tuples(st.integers(-5, 9), st.integers(1, 20), st.integers(0, 10)), min_size=6, max_size=6),
    st.sampled_from([0.0, 0.05, 0.3]),
    st.sampled_from([0.0, 0.5, 0.9]),
    st.integers(1, 6),
)
@settings(max_examples=50)
def test_filters_only_take_experts_away(
    rows: list[tuple[int, int, int]], alpha: float, stability: float, top_k: int
) -> None:
    risk = table_of(
        risk_diff=[row[0] / 20 for row in rows],
        p_maxt=[row[1] / 20 for row in rows],
        stability=[row[2] / 10 for row in rows],
    )
    plain = unsafe_experts(risk, by_prompt_tokens(top_k=top_k))
    kept = unsafe_experts(risk, by_prompt_tokens(top_k=top_k, alpha=alpha, stability=stability))
    assert [expert for expert in plain if expert in kept] == list(kept)


def test_row_order_and_number_of_batches_change_no_selection() -> None:
    risk = pd.concat([RISK, RISK.assign(batch_idx=4, risk_diff=RISK["risk_diff"].to_numpy()[::-1])])
    masks = select(risk.sample(frac=1, random_state=0), by_prompt_tokens())
    assert masks.selected[0] == unsafe_experts(RISK, by_prompt_tokens())
    assert masks.batch_idx == (0, 4)
    assert masks.selected[4][0] == Expert(2, 2)


def test_every_rule_names_its_source() -> None:
    for name, rule in RULES.items():
        assert len(rule.source) > 20
        assert by_prompt_tokens(rule=name).rule == name  # type: ignore[arg-type]
    assert "Wang et al. 2024" in RULES["esft_token"].source


def test_a_filter_that_leaves_nothing_says_so() -> None:
    with pytest.raises(InputError, match=r"passes identify\.alpha=0\.001 .*no selected expert is significant"):
        select(RISK, by_prompt_tokens(alpha=0.001))


def test_a_threshold_that_leaves_nothing_says_so() -> None:
    with pytest.raises(InputError, match=r"largest is 0\.3000; lower identify.threshold"):
        select(RISK, by_prompt_tokens(threshold=0.5))


@pytest.mark.parametrize(
    ("setting", "column"),
    [({"weighting": "activation"}, "risk_diff_activation"), ({"rule": "esft_gate"}, "w_unsafe"), ({"alpha": 0.1}, "p_maxt")],
)  # fmt: skip
def test_a_missing_column_is_an_error_that_names_it(setting: dict[str, Any], column: str) -> None:
    bare = RISK[["batch_idx", "layer", "expert", "risk_diff"]]
    with pytest.raises(InputError, match=f"needs the column '{column}'"):
        unsafe_experts(bare, by_prompt_tokens(**setting))
