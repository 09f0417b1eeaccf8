"""Plans, learning rates and early stopping are plain functions of their arguments."""

from __future__ import annotations

import pytest

from moe_ray.finetuning.schedule import has_stopped_improving, hash_plan, learning_rate_factor, plan_steps

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
