"""The cluster's machines as numbers."""

from __future__ import annotations

import pytest

from moe_ray.orchestration.cluster.cluster_nodes import cluster_nodes, describe_node, memory_to_ask
from moe_ray.resources.nodes import GB, Node, memory_here

RAY = {"CPU": 16.0, "memory": 100e9, "object_store_memory": 40e9, "GPU": 2.0, "accelerator_type:H100": 1.0}


def test_a_node_that_answers_has_the_memory_that_its_gpus_have():
    expected = Node(cpus=16, memory=140 * GB, gpus=2, gpu_memory=79 * GB, gpu_name="H100")
    assert describe_node(RAY, (2, 79 * GB, "H100 80GB HBM3")) == expected


def test_one_that_does_not_has_what_its_kind_of_gpu_is_known_for():
    assert describe_node(RAY, (0, None, "")).gpu_memory == 80 * GB
    unknown = {name: value for name, value in RAY.items() if not name.startswith("accelerator")}
    assert describe_node(unknown, (0, None, "")).gpu_memory is None


@pytest.mark.needs_ray
@pytest.mark.slow
@pytest.mark.filterwarnings("default")
def test_a_local_ray_is_this_machine_and_no_process_asks_for_more_than_it_has(ray_cluster):
    (node,) = cluster_nodes()
    assert (node.cpus, node.memory, node.gpus) == (4, memory_here(), 0)
    assert memory_to_ask(10**6) == 10**6
    assert memory_to_ask(10**15) < memory_here()
