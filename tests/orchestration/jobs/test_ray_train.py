"""Ray Train's actors know which Ray they are in, also where another one is at work on the machine."""

import os

import pytest

pytestmark = [pytest.mark.needs_ray, pytest.mark.filterwarnings("default")]


def test_the_actors_of_ray_train_are_told_the_address_and_nothing_of_it_stays(ray_cluster, monkeypatch):
    import ray
    from ray.train.v2._internal.constants import get_env_vars_to_propagate

    from moe_ray.orchestration.jobs.ray_train import _address_propagated

    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    address = ray.get_runtime_context().gcs_address
    with _address_propagated():
        assert get_env_vars_to_propagate()["RAY_ADDRESS"] == address
    assert "RAY_ADDRESS" not in os.environ
    assert "RAY_ADDRESS" not in get_env_vars_to_propagate()

    class Parent:
        def of_child(self):
            child = ray.remote(num_cpus=0)(lambda: os.environ.get("RAY_ADDRESS"))
            return ray.get(child.remote())

    with _address_propagated():
        parent = ray.remote(num_cpus=0, runtime_env={"env_vars": get_env_vars_to_propagate()})(Parent).remote()
    assert ray.get(parent.of_child.remote()) == address
