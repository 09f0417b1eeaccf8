"""Plans, learning rates and early stopping are plain functions of their arguments."""

from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from moe_ray.finetuning.schedule import (
    has_stopped_improving,
    hash_plan,
    learning_rate_factor,
    plan_steps,
    share_out,
)

IDS = [4, 8, 15, 16, 23]


@pytest.mark.parametrize("batches_per_step", [1, 2, 3, 7])
def test_every_batch_is_trained_once_an_epoch(batches_per_step):
    plan = plan_steps(IDS, epochs=2, batches_per_step=batches_per_step, seed=0)
    half = len(plan) // 2
    for epoch in (plan[:half], plan[half:]):
        assert sorted(batch for step in epoch for batch in step if batch >= 0) == IDS


def test_every_step_has_equally_many_places():
    plan = plan_steps(IDS, epochs=1, batches_per_step=3, seed=0)
    assert [len(step) for step in plan] == [3, 3]
    assert plan[-1].count(-1) == 1


def test_no_step_is_without_any_batch():
    assert all(max(step) >= 0 for step in plan_steps(IDS, epochs=3, batches_per_step=4, seed=1))


def test_the_order_is_new_every_epoch_and_the_same_for_the_same_seed():
    plan = plan_steps(IDS, epochs=2, batches_per_step=1, seed=3)
    assert plan[:5] != plan[5:]
    assert (
        plan
        == plan_steps(IDS, epochs=2, batches_per_step=1, seed=3)
        != plan_steps(IDS, epochs=2, batches_per_step=1, seed=4)
    )


def test_the_order_of_batches_does_not_depend_on_how_many_share_a_step():
    one = [step[0] for step in plan_steps(IDS, epochs=1, batches_per_step=1, seed=3)]
    two = [batch for step in plan_steps(IDS, epochs=1, batches_per_step=2, seed=3) for batch in step if batch >= 0]
    assert one == two


def test_different_plans_have_different_hashes():
    hashes = {
        hash_plan(plan_steps(IDS, epochs=e, batches_per_step=w, seed=s)) for e in (1, 2) for w in (1, 2) for s in (0, 1)
    }
    assert len(hashes) == 8


def factors(schedule, warmup, steps=4):
    return [learning_rate_factor(step, steps, schedule=schedule, warmup=warmup) for step in range(steps)]


@pytest.mark.parametrize(
    ("schedule", "warmup", "expected"),
    [
        ("constant", 0.0, [1, 1, 1, 1]),
        ("linear", 0.0, [1, 0.75, 0.5, 0.25]),
        ("cosine", 0.0, [1, 0.5 + 0.125**0.5, 0.5, 0.5 - 0.125**0.5]),
        ("constant", 0.5, [0.5, 1, 1, 1]),
        ("linear", 0.5, [0.5, 1, 1, 0.5]),
        ("cosine", 0.99, [0.25, 0.5, 0.75, 1]),
    ],
)
def test_learning_rate_follows_its_schedule(schedule, warmup, expected):
    assert factors(schedule, warmup) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("losses", "patience", "stopped"),
    [
        ([3, 2, 1], 1, False),
        ([3, 2, 2], 1, True),
        ([1, 2, 3], 3, False),
        ([1, 2, 3], 2, True),
        ([1, 2, 3], 0, False),
        ([], 1, False),
    ],
)
def test_stopping_needs_patience_many_epochs_without_a_lower_loss(losses, patience, stopped):
    assert has_stopped_improving(losses, patience) is stopped


# Batches of like length in a step

MANY = range(0, 2000, 2)
LENGTHS = {batch: 100 + batch * 37 % 1999 for batch in MANY}


def lost(plan):
    """Share of the workers' time that is spent waiting for the longest batch of each step."""
    costs = [[LENGTHS[batch] for batch in step] for step in plan]
    return 1 - sum(map(sum, costs)) / sum(max(step) * len(step) for step in costs)


@given(
    num=st.integers(1, 60),
    batches_per_step=st.integers(1, 9),
    window=st.integers(0, 60),
    seed=st.integers(0, 5),
    epochs=st.integers(1, 3),
)
def test_with_windows_too_every_batch_is_trained_once_an_epoch_and_no_step_is_empty(
    num, batches_per_step, window, seed, epochs
):
    ids = list(range(3, 3 + num))
    plan = plan_steps(
        ids, epochs=epochs, batches_per_step=batches_per_step, seed=seed, lengths=LENGTHS | dict.fromkeys(ids, 7),
        window=window,
    )  # fmt: skip
    steps = len(plan) // epochs
    for epoch in range(epochs):
        of_epoch = plan[epoch * steps : (epoch + 1) * steps]
        assert sorted(batch for step in of_epoch for batch in step if batch >= 0) == ids
        assert all(len(step) == batches_per_step and max(step) >= 0 for step in of_epoch)


def test_one_batch_a_step_keeps_its_order_whatever_the_window():
    expected = plan_steps(MANY, epochs=2, batches_per_step=1, seed=3)
    assert plan_steps(MANY, epochs=2, batches_per_step=1, seed=3, lengths=LENGTHS, window=50) == expected


@pytest.mark.parametrize("batches_per_step", [2, 8, 16])
def test_steps_from_sorted_windows_lose_little_time(batches_per_step):
    plans = [
        plan_steps(MANY[:960], epochs=3, batches_per_step=batches_per_step, seed=1, lengths=LENGTHS, window=window)
        for window in (0, 50)
    ]
    assert lost(plans[1]) < lost(plans[0]) / 3


def test_the_same_batches_share_no_step_in_every_epoch():
    plan = plan_steps(MANY, epochs=2, batches_per_step=4, seed=1, lengths=LENGTHS, window=1000)
    first, second = ({frozenset(step) for step in half} for half in (plan[:250], plan[250:]))
    assert len(first & second) < 10


def test_long_and_short_steps_come_in_any_order():
    plan = plan_steps(MANY, epochs=1, batches_per_step=4, seed=1, lengths=LENGTHS, window=50)
    means = [sum(LENGTHS[batch] for batch in step) for step in plan]
    of_quarters = [sum(means[start : start + 62]) / 62 for start in range(0, 248, 62)]
    assert max(of_quarters) < 1.25 * min(of_quarters)
    rising = sum(one < other for one, other in pairwise(means))
    assert 100 < rising < 150


def test_the_order_of_windows_is_a_function_of_the_seed():
    def plan(seed):
        return plan_steps(MANY, epochs=1, batches_per_step=4, seed=seed, lengths=LENGTHS, window=50)

    assert plan(1) == plan(1) != plan(2)


def test_without_lengths_there_is_no_window():
    plain = plan_steps(MANY, epochs=1, batches_per_step=4, seed=1)
    assert plan_steps(MANY, epochs=1, batches_per_step=4, seed=1, window=50) == plain
    assert plan_steps(MANY, epochs=1, batches_per_step=4, seed=1, lengths=LENGTHS, window=0) == plain


# Sharing a step out among workers


def test_batches_of_like_length_go_round():
    assert share_out([5, 3, 9, 1, -1, -1], num_workers=2) == [0, 1, 0, 1, 0, 1]


@given(lengths=st.lists(st.integers(1, 1000), min_size=1, max_size=40), num_workers=st.integers(1, 8))
def test_no_worker_has_more_to_do_than_the_mean_and_one_batch(lengths, num_workers):
    workers = share_out(range(len(lengths)), num_workers=num_workers, lengths=dict(enumerate(lengths)))
    loads = [sum(n for n, w in zip(lengths, workers, strict=True) if w == worker) for worker in range(num_workers)]
    assert sum(loads) == sum(lengths)
    assert max(loads) <= sum(lengths) / num_workers + max(lengths)


@given(num_workers=st.integers(1, 30))
def test_with_as_many_batches_as_workers_each_has_one(num_workers):
    lengths = {batch: 1 + batch * 7 % 5 for batch in range(num_workers)}
    workers = share_out(range(num_workers), num_workers=num_workers, lengths=lengths)
    assert sorted(workers) == list(range(num_workers))


def test_the_longest_batch_shares_a_worker_with_nobody_where_that_is_fair():
    assert share_out([1, 2, 3, 4], num_workers=2, lengths={1: 10, 2: 90, 3: 40, 4: 40}) == [1, 0, 1, 1]
