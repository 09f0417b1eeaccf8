"""Each selection rule does what its source says, and filters only take experts away."""

from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moe_ray.config.identify import IdentifyConfig
from moe_ray.errors import InputError
from moe_ray.experts import Expert
from moe_ray.identification.selection import RULES, select, select_unsafe_experts, unsafe_experts


def table(batch_idx: int = 0, **columns: list[float]) -> pd.DataFrame:
    """Layers 1 and 2 of three experts each."""
    base = {"batch_idx": [batch_idx] * 6, "layer": [1, 1, 1, 2, 2, 2], "expert": [0, 1, 2] * 2}
    return pd.DataFrame({**base, **columns})


RISK = table(
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
    return [str(expert) for expert in unsafe_experts(RISK, IdentifyConfig(**setting), seed=1)]


def test_risk_diff_is_the_plain_method() -> None:
    assert names() == ["L01_E00", "L02_E00", "L01_E01", "L01_E02"]
    assert select(RISK, IdentifyConfig()).selected == select_unsafe_experts(RISK).selected


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
    plain = select(big, IdentifyConfig(rule="risk_diff"))
    drawn = select(big, IdentifyConfig(rule="random"), seed=4)
    for batch in (0, 1):
        per_layer = [Counter(expert.layer for expert in masks.selected[batch]) for masks in (plain, drawn)]
        assert per_layer[0] == per_layer[1]
    assert drawn.selected[0] != drawn.selected[1]
    assert drawn.digest() == select(big, IdentifyConfig(rule="random"), seed=4).digest()
    assert drawn.digest() != select(big, IdentifyConfig(rule="random"), seed=5).digest()


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
@settings(deadline=None, max_examples=50)
def test_filters_only_take_experts_away(
    rows: list[tuple[int, int, int]], alpha: float, stability: float, top_k: int
) -> None:
    risk = table(
        risk_diff=[row[0] / 20 for row in rows],
        p_maxt=[row[1] / 20 for row in rows],
        stability=[row[2] / 10 for row in rows],
    )
    plain = unsafe_experts(risk, IdentifyConfig(top_k=top_k))
    kept = unsafe_experts(risk, IdentifyConfig(top_k=top_k, alpha=alpha, stability=stability))
    assert [expert for expert in plain if expert in kept] == list(kept)


def test_row_order_and_number_of_batches_change_no_selection() -> None:
    risk = pd.concat([RISK, RISK.assign(batch_idx=4, risk_diff=RISK["risk_diff"].to_numpy()[::-1])])
    masks = select(risk.sample(frac=1, random_state=0), IdentifyConfig())
    assert masks.selected[0] == unsafe_experts(RISK, IdentifyConfig())
    assert masks.batch_idx == (0, 4)
    assert masks.selected[4][0] == Expert(2, 2)


def test_every_rule_names_its_source() -> None:
    for name, rule in RULES.items():
        assert len(rule.source) > 20
        assert IdentifyConfig(rule=name).rule == name  # type: ignore[arg-type]
    assert "Wang et al. 2024" in RULES["esft_token"].source


def test_a_filter_that_leaves_nothing_says_so() -> None:
    with pytest.raises(InputError, match=r"passes identify\.alpha=0\.001 .*cannot be told from noise"):
        select(RISK, IdentifyConfig(alpha=0.001))


def test_a_threshold_that_leaves_nothing_says_so() -> None:
    with pytest.raises(InputError, match=r"largest is 0\.3000; lower identify.threshold"):
        select(RISK, IdentifyConfig(threshold=0.5))


@pytest.mark.parametrize(
    ("setting", "column"),
    [({"weighting": "activation"}, "risk_diff_activation"), ({"rule": "esft_gate"}, "w_unsafe"), ({"alpha": 0.1}, "p_maxt")],
)  # fmt: skip
def test_a_missing_column_is_an_error_that_names_it(setting: dict[str, Any], column: str) -> None:
    bare = RISK[["batch_idx", "layer", "expert", "risk_diff"]]
    with pytest.raises(InputError, match=f"needs the column '{column}'"):
        unsafe_experts(bare, IdentifyConfig(**setting))
