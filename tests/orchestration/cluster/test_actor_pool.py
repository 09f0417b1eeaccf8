"""The pool of actors: whole blocks, each once; with GPUs asked for too."""

from __future__ import annotations

import time

import pyarrow as pa
import pytest
import ray
import ray.data

from moe_ray.errors import InputError
from moe_ray.orchestration.cluster.actor_pool import blocks_of, in_actors, mapped

pytestmark = [pytest.mark.needs_ray, pytest.mark.slow, pytest.mark.filterwarnings("default")]


class Doubling:
    """Defined in a function's reach of Ray's workers, which cannot import test modules."""

    def __init__(self, factor):
        self.factor = factor

    def __call__(self, columns):
        return {"row": columns["row"] * self.factor, "rows": [len(columns["row"])] * len(columns["row"])}


@pytest.fixture(autouse=True)
def shipped_by_value(ray_cluster):
    import sys

    ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])


def test_every_block_is_one_call_and_comes_once():
    blocks = blocks_of(pa.table({"row": list(range(10))}), 4)
    with in_actors(blocks, Doubling, (2,), what="doubling", num_actors=1) as pool:
        results = list(pool)
    assert sorted(row for columns in results for row in columns["row"]) == [2 * row for row in range(10)]
    assert sorted({size for columns in results for size in columns["rows"]}) == [2, 4]


def test_gpus_may_be_asked_for():
    # Ray Data refuses a pipeline with GPUs whose batches have no size, when it is built: nothing runs here.
    blocks = blocks_of(pa.table({"row": [1, 2, 3]}), 2)
    pool = ray.data.ActorPoolStrategy(size=1)
    assert mapped(blocks, Doubling, (2,), pool, gpus_per_actor=0.5) is not None


def test_more_actors_than_a_local_ray_has_cpus_for_are_refused():
    blocks = blocks_of(pa.table({"row": [1]}), 1)
    pool = in_actors(blocks, Doubling, (2,), what="doubling", num_actors=99)
    with pytest.raises(InputError, match=r"doubling needs 100 logical CPUs"):
        pool.__enter__()


def test_after_an_error_of_ours_the_actors_are_gone():
    before = ray.available_resources()["CPU"]
    blocks = blocks_of(pa.table({"row": list(range(64))}), 1)

    def stops_at_the_first_result():
        with in_actors(blocks, Doubling, (2,), what="doubling", num_actors=1) as pool:
            raise InputError(f"got {next(pool)['row']}")

    with pytest.raises(InputError, match=r"got \["):
        stops_at_the_first_result()
    assert ray.available_resources()["CPU"] == before


def test_an_error_of_an_actor_is_not_waited_for():
    # The error holds the actors until it is forgotten, so waiting for them would take the whole time limit.
    blocks = blocks_of(pa.table({"row": ["text"]}), 1)
    began = time.monotonic()

    def fails():
        with in_actors(blocks, Doubling, ("x",), what="doubling", num_actors=1) as pool:
            list(pool)

    with pytest.raises(ray.exceptions.RayError, match="can't multiply"):
        fails()
    assert time.monotonic() - began < 45
