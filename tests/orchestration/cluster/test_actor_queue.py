"""An actor gets its next work when it is free; what one died of is done again; afterwards all are gone."""

from __future__ import annotations

import os
import sys
import threading
import time

import pytest
import ray

from moe_ray.errors import InputError
from moe_ray.orchestration.cluster.actor_queue import fed_actors

pytestmark = [pytest.mark.needs_ray, pytest.mark.slow, pytest.mark.filterwarnings("default")]


class Doubling:
    """Says twice what it is told, and its process."""

    def __init__(self, factor, where=None):
        if factor is None:
            raise InputError("factor: got None, expected a number")
        self.factor, self.where = factor, where

    def __call__(self, work):
        if work == "wrong":
            raise InputError("got 'wrong', expected a number")
        if work == "fault":
            raise ZeroDivisionError("a fault")
        if self.where is not None and work == 3:
            try:
                os.close(os.open(f"{self.where}/died", os.O_CREAT | os.O_EXCL))
            except FileExistsError:
                pass
            else:
                os._exit(1)
        return work * self.factor, os.getpid()


class Meeting:
    """Each call waits for another one in the same process."""

    def __init__(self):
        self.barrier = threading.Barrier(2, timeout=60)

    def __call__(self, work):
        self.barrier.wait()
        return work


@pytest.fixture(autouse=True)
def shipped_by_value(ray_cluster):
    ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])


def feed(items, *arguments, actor=Doubling, num_actors=1, **named):
    work = iter(items)
    with fed_actors(
        actor, arguments, lambda: next(work, None), what="doubling", num_actors=num_actors, **named
    ) as pool:
        return list(pool)


def free_cpus():
    return ray.available_resources()["CPU"]


def test_all_work_is_done_once_by_as_many_processes_as_asked_for():
    before = free_cpus()
    results = feed(range(1, 40), 2, num_actors=2)
    assert sorted(double for double, _ in results) == [2 * number for number in range(1, 40)]
    assert 1 <= len({process for _, process in results}) <= 2
    assert free_cpus() == before


def test_no_work_needs_no_result():
    assert feed([], 2) == []


def test_an_actor_works_on_one_while_it_gets_the_next():
    assert sorted(feed([1, 2, 3, 4], actor=Meeting)) == [1, 2, 3, 4]


def test_what_a_result_says_decides_what_comes_next():
    """The next work is asked for after the result before it was seen."""
    seen = [1]
    with fed_actors(
        Doubling, (2,), lambda: seen[-1] if len(seen) < 6 else None, what="doubling", num_actors=1
    ) as results:
        for double, _ in results:
            seen.append(double)
    # The first two were handed out before there was any result.
    assert seen[:4] == [1, 2, 2, 4]
    assert max(seen) <= 2 * sorted(seen)[-2]


def test_the_work_of_a_process_that_died_is_done_by_another(tmp_path):
    results = feed(range(1, 9), 2, str(tmp_path))
    assert (tmp_path / "died").exists()
    assert sorted(double for double, _ in results) == [2 * number for number in range(1, 9)]


@pytest.mark.parametrize(
    ("items", "factor", "error", "says"),
    [
        ([1, "wrong", 2], 2, InputError, "got 'wrong', expected a number"),
        ([1, 2], None, InputError, "factor: got None"),
        ([1, "fault"], 2, ZeroDivisionError, "a fault"),
    ],
)
def test_an_error_of_an_actor_is_raised_and_the_actors_are_gone(items, factor, error, says):
    before = free_cpus()
    with pytest.raises(error, match=says) as caught:
        feed(items, factor)
    if error is InputError:
        assert "\n" not in str(caught.value)
    del caught
    deadline = time.monotonic() + 30
    while free_cpus() != before:
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_more_actors_than_a_local_ray_has_cpus_for_are_refused_and_extra_ones_are_not_waited_for():
    with pytest.raises(InputError, match="doubling needs 99 logical CPUs"):
        feed([1], 2, num_actors=99)
    assert feed([1], 2, num_actors=1, max_actors=99)[0][0] == 2
