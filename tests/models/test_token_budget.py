"""Forward passes within a budget of tokens: every row once, and a way on when memory runs out."""

import pytest
import torch

from moe_ray.errors import InputError, NotFinite
from moe_ray.models.token_budget import TokenBudget
from moe_ray.prompts.quarantine import FORWARD_FAILED, OUT_OF_MEMORY, Rejected


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


def test_where_every_row_must_be_done_memory_is_halved_in_the_same_way():
    budget, done = TokenBudget(8192), []
    results = list(budget.run_all([10 * (row + 1) for row in range(50)], limited(1000, done)))
    assert [group for group, _ in results] == done
    assert sorted(row for group in done for row in group) == list(range(50))
    assert 500 < budget.tokens <= 1000


def test_where_every_row_must_be_done_one_that_fits_nowhere_is_an_error_that_says_its_length():
    with pytest.raises(InputError, match="a row of 400 tokens does not fit in memory"):
        list(TokenBudget(40).run_all([400, 10, 10], too_large_is_row(0)))


@pytest.mark.parametrize("error", [RuntimeError, IndexError, NotFinite])
def test_where_every_row_must_be_done_no_error_is_set_aside(error):
    with pytest.raises(error, match="index out of range"):
        list(TokenBudget(8192).run_all([10] * 6, limited(10_000, [], broken=(3,), error=error)))


def test_padding_is_limited_only_where_it_is_asked_for():
    lengths, work = [100, 100, 10, 10], len
    assert [group for group, _ in TokenBudget(8192).run_all(lengths, work)] == [[0, 1], [2, 3]]
    assert [group for group, _ in TokenBudget(8192).run_all(lengths, work, max_padding=1.0)] == [[0, 1, 2, 3]]
