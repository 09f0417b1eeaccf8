"""Forward passes within a budget of tokens: little padding, every row once, and a way on when memory runs out."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from moe_ray.errors import InputError, NotFinite
from moe_ray.prompts.quarantine import FORWARD_FAILED, OUT_OF_MEMORY, Rejected
from moe_ray.routing.token_budget import MAX_PADDING, TokenBudget, padded_tokens, plan_forwards

LENGTHS = st.lists(st.integers(1, 5000), max_size=200)


@given(lengths=LENGTHS, budget=st.integers(1, 10_000))
def test_every_row_is_in_one_group_within_the_budget_and_with_little_padding(lengths, budget):
    groups = plan_forwards(lengths, tokens_per_forward=budget)
    assert sorted(row for group in groups for row in group) == list(range(len(lengths)))
    for group in groups:
        padded, real = padded_tokens(lengths, group), sum(lengths[row] for row in group)
        assert padded <= budget or len(group) == 1
        assert padded - real <= MAX_PADDING * padded


def test_padding_of_mixed_lengths_stays_under_a_tenth_in_few_forward_passes():
    lengths = np.random.default_rng(0).lognormal(5, 0.8, 1024).astype(int) + 1
    groups = plan_forwards(lengths.tolist(), tokens_per_forward=8192)
    padded = sum(padded_tokens(lengths, group) for group in groups)
    in_order = sum(padded_tokens(lengths, range(start, start + 32)) for start in range(0, 1024, 32))
    assert 1 - lengths.sum() / padded < 0.1 < 1 - lengths.sum() / in_order
    assert len(groups) < 2 * np.ceil(lengths.sum() / 8192)


def limited(memory, done, broken=(), error=RuntimeError):
    """Work that has room for so many padded tokens of rows with 10, 20, … tokens, and fails on some."""

    def work(group):
        if len(group) * max(10 * (row + 1) for row in group) > memory:
            raise torch.OutOfMemoryError("tried to allocate too much")
        if set(group) & set(broken):
            raise error("index out of range\nmore")
        done.append(group)
        return sum(group)

    return work


def test_a_group_that_runs_out_of_memory_is_halved_and_goes_on():
    budget, done = TokenBudget(8192), []
    results = list(budget.run([10 * (row + 1) for row in range(50)], limited(1000, done)))
    assert sorted(row for group, _ in results for row in group) == list(range(50))
    assert [group for group, _ in results] == done
    assert budget.halvings > 0
    assert 500 < budget.tokens <= 1000


def test_a_row_that_fits_nowhere_is_rejected_and_shrinks_nobody_elses_budget():
    budget = TokenBudget(40)
    outcomes = {row: outcome for group, outcome in budget.run([400, 10, 10], too_large_is_row(0)) for row in group}
    assert isinstance(outcomes[0], Rejected)
    assert outcomes[0].reason == OUT_OF_MEMORY
    assert outcomes[1] == outcomes[2] == "done"
    assert budget.tokens == 40


def too_large_is_row(large):
    def work(group):
        if large in group:
            raise torch.OutOfMemoryError("tried to allocate too much")
        return "done"

    return work


@pytest.mark.parametrize("error", [RuntimeError, IndexError, NotFinite])
def test_a_group_that_fails_is_tried_row_by_row(error):
    done = []
    work = limited(10_000, done, broken=(3,), error=error)
    outcomes = {row: outcome for group, outcome in TokenBudget(8192).run([10] * 6, work) for row in group}
    assert outcomes[3].reason == FORWARD_FAILED
    assert "index out of range" in outcomes[3].detail
    assert sorted(row for group in done for row in group) == [0, 1, 2, 4, 5]


def test_what_is_wrong_with_the_model_stops_everything():
    with pytest.raises(InputError, match="index"):
        list(TokenBudget(8192).run([10] * 6, limited(10_000, [], broken=(3,), error=InputError)))
