"""How many of a job's processes share a node's cores: those of the node, not those of the cluster."""

import pytest
import ray
import torch

from moe_ray.orchestration.cluster import node_share
from moe_ray.orchestration.cluster.model_process import process_device, quiet_and_threaded
from moe_ray.orchestration.cluster.node_share import expected_on_node, processes_on_this_node


def node(name, *, cpus=0.0, gpus=0.0, alive=True):
    return {"NodeID": name, "Alive": alive, "Resources": {"CPU": cpus, "GPU": gpus, "memory": 1e9}}


ON_CPU = {"CPU": 1.0}


@pytest.mark.parametrize(
    ("num_processes", "needs", "nodes", "expected"),
    [
        (16, ON_CPU, [node(f"n{i}", cpus=32) for i in range(16)], 1),
        (17, ON_CPU, [node(f"n{i}", cpus=32) for i in range(16)], 2),
        (3, ON_CPU, [node("n0", cpus=4)], 3),
        (2, ON_CPU, [node("n0", cpus=4), node("head", cpus=0)], 2),
        (2, ON_CPU, [node("n0", cpus=4), node("lost", cpus=4, alive=False)], 2),
        (8, {"CPU": 1.0, "GPU": 1.0}, [node("n0", cpus=64, gpus=4), node("n1", cpus=64, gpus=4)], 4),
        (8, {"CPU": 1.0, "GPU": 2.0}, [node("n0", cpus=64, gpus=8), node("n1", cpus=64)], 4),
        (4, {"CPU": 1.0, "GPU": 0.5}, [node("n0", cpus=64, gpus=1)], 2),
        # The other node has room for one only, so this one gets the rest.
        (6, ON_CPU, [node("n0", cpus=8), node("n1", cpus=1)], 5),
    ],
)
def test_processes_are_spread_over_the_nodes_that_have_room(num_processes, needs, nodes, expected):
    assert expected_on_node(num_processes, needs, nodes, "n0") == expected


def test_every_process_has_a_node():
    nodes = [node("n0", cpus=3), node("n1", cpus=1), node("n2", cpus=16), node("n3")]
    for num_processes in range(1, 21):
        expected = [expected_on_node(num_processes, ON_CPU, nodes, f"n{i}") for i in range(3)]
        assert num_processes <= sum(expected)
        assert all(1 <= count <= nodes[i]["Resources"]["CPU"] for i, count in enumerate(expected))


def test_a_driver_without_ray_is_alone_and_starts_none():
    if ray.is_initialized():
        pytest.skip("a test before this one has started Ray in this process")
    assert processes_on_this_node(16) == 1
    assert process_device().type == "cpu"
    assert not ray.is_initialized()


@pytest.mark.needs_ray
@pytest.mark.filterwarnings("default")
def test_an_actor_counts_those_of_its_node_and_a_driver_itself(ray_cluster, monkeypatch):
    assert processes_on_this_node(3) == 1

    @ray.remote(num_cpus=1)
    def share():
        monkey = pytest.MonkeyPatch()
        monkey.setattr("moe_ray.threads.usable_cores", lambda: 12)
        quiet_and_threaded(node_share.processes_on_this_node(3))
        monkey.undo()
        return torch.get_num_threads()

    assert ray.get(share.remote()) == 4


@pytest.mark.needs_ray
@pytest.mark.filterwarnings("default")
def test_threads_of_workers_wait_passively(ray_cluster):
    import os

    @ray.remote(num_cpus=1)
    def policy():
        return os.environ.get("OMP_WAIT_POLICY")

    assert ray.get(policy.remote()) == "PASSIVE"
