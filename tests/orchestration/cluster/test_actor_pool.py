"""The pool of actors: each block once, also where an actor dies, which is started again as Ray was promised it can be."""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path

import pytest
import ray

from moe_ray.errors import InputError
from moe_ray.orchestration.cluster.actor_pool import in_actors

pytestmark = [pytest.mark.needs_ray, pytest.mark.slow, pytest.mark.filterwarnings("default")]


class Times:
    def __init__(self, factor):
        self.factor = factor

    def __call__(self, number):
        return number * self.factor


class Dies:
    """Ends its process at block 2, as often as told."""

    def __init__(self, marks, times):
        self.marks, self.times = Path(marks), times

    def __call__(self, number):
        deaths = len(list(self.marks.iterdir()))
        if number == 2 and deaths < self.times:
            (self.marks / str(os.getpid())).touch()
            os._exit(1)
        return number, os.getpid()


class Named:
    def __call__(self, block):
        return ray.get_runtime_context().get_task_name()


@pytest.fixture(autouse=True)
def shipped_by_value(ray_cluster):
    """Ray's workers cannot import test modules."""
    ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])


def test_every_block_comes_once_and_the_cpus_are_free_afterwards():
    before = ray.available_resources()["CPU"]
    with in_actors(range(10), Times, (2,), what="doubling", num_actors=2) as results:
        assert sorted(results) == [2 * number for number in range(10)]
        assert ray.available_resources()["CPU"] == before - 2
    assert ray.available_resources()["CPU"] == before


def test_an_actor_that_dies_is_started_again_and_ray_says_nothing_of_a_restart_that_would_fail(tmp_path, capfd):
    with in_actors(range(5), Dies, (tmp_path, 1), what="dying", num_actors=1) as results:
        done = list(results)
    (dead,) = (int(mark.name) for mark in tmp_path.iterdir())
    assert sorted(number for number, _ in done) == [0, 1, 2, 3, 4]
    pids = {pid for _, pid in done}
    assert len(pids) == 2
    assert dead in pids
    assert "restart will fail" not in capfd.readouterr().err


def test_an_actor_that_dies_again_and_again_ends_with_a_sentence(tmp_path):
    with (
        pytest.raises(InputError, match=r"dying: a process ended 4 times, as it does where memory runs out"),
        in_actors([2], Dies, (tmp_path, 99), what="dying", num_actors=1) as results,
    ):
        list(results)
    assert len(list(tmp_path.iterdir())) == 4


def test_tasks_carry_the_works_name():
    with in_actors([None], Named, (), what="judging", num_actors=1) as results:
        assert list(results) == ["judging"]


def test_more_actors_than_a_local_ray_has_room_for_are_refused():
    for options, said in (({"num_actors": 99}, "99 logical CPUs"), ({"num_actors": 1, "gpus_per_actor": 2}, "2 GPUs")):
        with pytest.raises(InputError, match=f"doubling needs {said}"):
            in_actors([1], Times, (2,), what="doubling", **options).__enter__()


def test_an_error_is_raised_at_once_as_it_was_and_the_actors_end():
    before, began = ray.available_resources()["CPU"], time.monotonic()
    with (
        pytest.raises(ray.exceptions.RayError, match="can't multiply"),
        in_actors(["text"], Times, ("x",), what="doubling", num_actors=1) as results,
    ):
        list(results)
    assert time.monotonic() - began < 45
    while ray.available_resources()["CPU"] < before:
        assert time.monotonic() - began < 60
        time.sleep(0.05)
