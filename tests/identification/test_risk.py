"""Risk differences are the design's, whatever the row order and whoever is called unsafe."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from prompt_tokens import by_prompt_tokens

from moe_ray.errors import InputError
from moe_ray.identification.identify import identify
from moe_ray.identification.risk import (
    add_rates,
    batches_with_both_labels,
    example_counts,
    label_tokens,
)
from moe_ray.routing.counts import RoutingCounts, concat_counts
from moe_ray.testing.simulated_counts import Population, simulate

RISK_COLUMNS = (
    "batch_idx", "layer", "expert", "a_safe", "d_safe", "a_unsafe", "d_unsafe", "a_safe_n", "a_unsafe_n", "risk_diff",
)  # fmt: skip

ROUNDING = 1e-12  # sums of up to a few hundred fractions in float64


def risk_of(counts: RoutingCounts, **setting: object) -> pd.DataFrame:
    """The part of the risk table that says nothing about certainty."""
    return identify(counts, by_prompt_tokens(permutations=0, resamples=0, **setting))[list(RISK_COLUMNS)]


def by_hand() -> RoutingCounts:
    """Two batches, one layer (decoder layer 3), three experts, two per token; the second batch has a response too."""
    return RoutingCounts(
        batch_idx=np.array([7, 7, 7, 9, 9, 9]),
        in_batch_idx=np.array([0, 1, 2, 0, 1, 1]),
        label=np.array(["safe", "safe", "unsafe", "safe", "unsafe", "unsafe"], dtype=object),
        category=np.full(6, "", dtype=object),
        role=np.array(["prompt"] * 5 + ["response"], dtype=object),
        num_tokens=np.array([4, 6, 5, 2, 4, 4]),
        counts_NLE=np.array([[4, 3, 1], [6, 5, 1], [1, 5, 4], [2, 1, 1], [4, 0, 4], [0, 4, 4]], dtype=np.int32)[
            :, None
        ],
        layers=(3,),
        num_experts_per_tok=2,
    )


def shuffled(counts: RoutingCounts, seed: int) -> RoutingCounts:
    return counts.take(np.random.default_rng(seed).permutation(len(counts)))


@st.composite
def some_counts(draw: st.DrawFn) -> RoutingCounts:
    """One or two batches of any make-up, with prompts of very different length."""
    population = Population(
        num_layers=draw(st.integers(1, 3)),
        num_experts=draw(st.integers(2, 6)),
        num_experts_per_tok=draw(st.integers(1, 2)),
        own_taste=draw(st.sampled_from([0.0, 0.5, 2.0])),
        unsafe_tokens=(1, draw(st.integers(1, 40))),
    )
    return simulate(
        population,
        num_batches=draw(st.integers(1, 2)),
        safe_per_batch=draw(st.integers(1, 5)),
        unsafe_per_batch=draw(st.integers(1, 5)),
        seed=draw(st.integers(0, 10_000)),
    )


def test_counts_give_the_hand_worked_table() -> None:
    risk = risk_of(by_hand())
    assert tuple(risk.columns) == RISK_COLUMNS
    first = risk[risk["batch_idx"] == 7]
    assert first["layer"].tolist() == [3, 3, 3]
    assert first["expert"].tolist() == [0, 1, 2]
    assert first["a_safe"].tolist() == [10, 8, 2]
    assert first["d_safe"].tolist() == [0, 2, 8]
    assert first["a_unsafe"].tolist() == [1, 5, 4]
    assert first["d_unsafe"].tolist() == [4, 0, 1]
    assert first["a_safe_n"].tolist() == [1.0, 0.8, 0.2]
    assert first["a_unsafe_n"].tolist() == [0.2, 1.0, 0.8]
    assert first["risk_diff"].tolist() == [-0.8, 0.2, 0.6]
    second = risk[risk["batch_idx"] == 9]
    assert second["risk_diff"].tolist() == [0.0, -0.5, 0.5]


def test_roles_of_an_example_are_added_up() -> None:
    batch = list(example_counts(by_hand(), roles=("prompt", "response")))[1]
    assert batch.tokens_N.tolist() == [2, 8]
    assert batch.counts_NX.tolist() == [[2, 1, 1], [4, 4, 8]]


@pytest.mark.slow
@given(some_counts(), st.integers(0, 1000))
@settings(max_examples=40)
def test_row_order_changes_nothing(counts: RoutingCounts, seed: int) -> None:
    pd.testing.assert_frame_equal(risk_of(shuffled(counts, seed)), risk_of(counts))


@given(some_counts())
@settings(max_examples=40)
def test_swapping_the_labels_flips_the_sign_exactly(counts: RoutingCounts) -> None:
    swapped = replace(counts, label=np.where(counts.label == "safe", "unsafe", "safe").astype(object))
    there, back = risk_of(counts), risk_of(swapped)
    np.testing.assert_array_equal(back["risk_diff"], -there["risk_diff"])
    np.testing.assert_array_equal(back["a_safe"], there["a_unsafe"])


@given(some_counts())
@settings(max_examples=40)
def test_differences_sum_to_zero_within_a_layer(counts: RoutingCounts) -> None:
    sums = risk_of(counts).groupby(["batch_idx", "layer"])["risk_diff"].sum()
    np.testing.assert_allclose(sums, 0.0, atol=ROUNDING)


@pytest.mark.slow
@given(some_counts())
@settings(max_examples=40)
def test_difference_is_that_of_the_rates(counts: RoutingCounts) -> None:
    risk = risk_of(counts)
    np.testing.assert_allclose(risk["risk_diff"], risk["a_unsafe_n"] - risk["a_safe_n"], atol=ROUNDING)


@pytest.mark.slow
@given(some_counts())
@settings(max_examples=20)
def test_a_batch_depends_on_its_own_rows_only(counts: RoutingCounts) -> None:
    whole = risk_of(counts)
    for batch in np.unique(counts.batch_idx):
        alone = risk_of(counts.take(counts.batch_idx == batch))
        pd.testing.assert_frame_equal(alone, whole[whole["batch_idx"] == batch].reset_index(drop=True))


def test_rates_of_a_table_from_elsewhere() -> None:
    table = pd.DataFrame({"a_safe": [3, 0], "d_safe": [1, 8], "a_unsafe": [1, 5], "d_unsafe": [1, 5]})
    rated = add_rates(table)
    assert rated["a_safe_n"].tolist() == [0.75, 0.0]
    assert rated["risk_diff"].tolist() == [-0.25, 0.5]


def test_a_batch_without_a_label_is_an_error_that_names_it() -> None:
    counts = by_hand()
    with pytest.raises(InputError, match="batch 9: got 2 safe and 0 unsafe tokens, expected both"):
        risk_of(counts.take(np.array([0, 1, 2, 3])))


def test_an_unknown_label_is_an_error() -> None:
    counts = replace(by_hand(), label=np.array(["harmful"] * 6, dtype=object))
    with pytest.raises(InputError, match="got \\['harmful'\\], expected 'safe' or 'unsafe'"):
        risk_of(counts)


def test_a_role_nobody_has_is_an_error() -> None:
    with pytest.raises(InputError, match="no routing counts of role response"):
        risk_of(by_hand().take(np.array([0, 1, 2])), roles=("response",))


def test_examples_without_tokens_are_left_out() -> None:
    empty = by_hand().take(np.array([0]))
    empty = replace(
        empty, in_batch_idx=np.array([5]), num_tokens=np.array([0]), counts_NLE=np.zeros((1, 1, 3), np.int32)
    )
    assert len(next(example_counts(concat_counts([by_hand(), empty]))).tokens_N) == 3


def both_labels(counts: RoutingCounts, role: str = "prompt") -> list[int]:
    return batches_with_both_labels(label_tokens(counts, (role,)), (role,))


def test_a_batch_whose_tokens_have_one_label_is_named_and_left_out(caplog: pytest.LogCaptureFixture) -> None:
    assert both_labels(by_hand()) == [7, 9]
    assert not caplog.records
    assert both_labels(by_hand().take(np.array([0, 1, 2, 3]))) == [7]
    assert "batches [9] have prompt tokens of one label only" in caplog.text


def test_a_label_may_be_in_another_part_than_the_other() -> None:
    parts = pd.DataFrame({"batch_idx": [4, 7, 4], "safe": [0, 5, 2], "unsafe": [3, 0, 0]})
    assert batches_with_both_labels(parts, ("prompt",)) == [4]


def test_no_batch_with_tokens_of_both_labels_is_an_error() -> None:
    with pytest.raises(InputError, match="none of 1 batches has response tokens of both labels"):
        both_labels(by_hand(), "response")


def test_a_batchs_counts_print_as_one_line() -> None:
    assert repr(next(example_counts(by_hand()))) == "ExampleCounts(batch 7, 2 safe + 1 unsafe, 3 experts)"
