"""What a machine says of itself."""

from __future__ import annotations

from moe_ray.resources.nodes import KNOWN_GPUS, memory_here, read_gpus, this_machine


def test_gpus_are_read_from_what_their_driver_says_the_smallest_counts():
    answer = "81559, NVIDIA H100 80GB HBM3\n40960, NVIDIA A100-PCIE-40GB\n"
    assert read_gpus(answer) == (2, 40960 << 20, "A100-PCIE-40GB")


def test_an_answer_without_gpus_is_none():
    assert read_gpus("No devices were found\n") == (0, None, "")


def test_this_machine_has_cores_and_memory():
    node = this_machine()
    assert node.cpus >= 1
    assert node.memory == memory_here() > 1 << 28
    assert this_machine(cpus=7).cpus == 7


def test_known_gpus_have_memory_that_exists():
    assert all(8 <= size <= 300 for size in KNOWN_GPUS.values())
