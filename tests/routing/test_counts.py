"""Routing counts keep their rows together, whatever is joined or taken."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from moe_ray.errors import InputError
from moe_ray.routing.counts import RoutingCounts, concat_counts


def some_counts(batch_idx: int = 5, num_experts: int = 4) -> RoutingCounts:
    """Two examples, the second with a response; two layers, two experts per token."""
    rng = np.random.default_rng(batch_idx)
    num_tokens = np.array([3, 4, 2])
    picks = [np.stack([rng.permutation(num_experts)[:2] for _ in range(2 * tokens)]) for tokens in num_tokens]
    counts = [[np.bincount(half.ravel(), minlength=num_experts) for half in np.split(picked, 2)] for picked in picks]
    return RoutingCounts(
        batch_idx=np.full(3, batch_idx),
        in_batch_idx=np.array([0, 1, 1]),
        label=np.array(["safe", "unsafe", "unsafe"], dtype=object),
        category=np.full(3, "fraud", dtype=object),
        role=np.array(["prompt", "prompt", "response"], dtype=object),
        num_tokens=num_tokens,
        counts_NLE=np.array(counts, dtype=np.int32),
        layers=(1, 3),
        num_experts_per_tok=2,
        pair=np.full(3, "", dtype=object),
    )


def test_parts_in_any_order_give_the_same_counts():
    parts = [some_counts(5), some_counts(1)]
    first, second = concat_counts(parts), concat_counts(parts[::-1])
    assert np.array_equal(first.counts_NLE, second.counts_NLE)
    assert first.batch_idx.tolist() == second.batch_idx.tolist() == [1, 1, 1, 5, 5, 5]
    assert first.role.tolist() == ["prompt", "prompt", "response"] * 2


@pytest.mark.parametrize("other", [some_counts(num_experts=5), replace(some_counts(), layers=(0, 1))])
def test_counts_of_different_models_are_not_joined(other):
    with pytest.raises(InputError, match="different models"):
        concat_counts([some_counts(), other])


def test_no_parts_are_refused():
    with pytest.raises(InputError, match="at least one batch"):
        concat_counts([])


def test_damaged_counts_are_refused():
    counts = some_counts()
    counts.check()
    counts.counts_NLE[1, 0, 0] += 1
    with pytest.raises(InputError, match=r"batch 5, example 1, layer 1: got a sum of 9, .*capture them again"):
        counts.check()


def test_rows_are_taken_with_all_that_belongs_to_them():
    counts = some_counts()
    taken = counts.take(np.array([2, 0]))
    assert taken.role.tolist() == ["response", "prompt"]
    assert np.array_equal(taken.counts_NLE, counts.counts_NLE[[2, 0]])
    assert len(counts.take(counts.label == "safe")) == 1


def test_counts_print_as_one_line():
    assert repr(some_counts()) == (
        "RoutingCounts(2 examples in 1 batches, 9 tokens of prompt+response, 2x4, 2 per token)"
    )
    weights = np.zeros((3, 2, 4), dtype=np.float32)
    assert repr(replace(some_counts(), weights_NLE=weights)).endswith("2 per token, weights)")


def test_a_table_of_counts_has_a_row_per_example_and_role():
    table = some_counts().to_frame()
    assert table.columns.tolist() == ["batch_idx", "in_batch_idx", "label", "category", "role", "num_tokens", "pair"]
    assert table["num_tokens"].tolist() == [3, 4, 2]
    assert "pair" not in replace(some_counts(), pair=None).to_frame()
