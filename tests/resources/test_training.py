"""A training that has no room is refused before anything loads; one that needs more GPUs than the weights gets them."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moe_ray.config.finetune import FinetuneConfig
from moe_ray.config.io import with_settings
from moe_ray.config.run import Config
from moe_ray.errors import InputError
from moe_ray.resources.model_size import ModelSize
from moe_ray.resources.nodes import GB, Node
from moe_ray.resources.training import Room, training_bytes

OLMOE = ModelSize(
    name="OLMoE-1B-7B", parameters=6_919_161_856, experts=1024, expert_parameters=6_291_456, own_dtype="bfloat16"
)
H100 = Node(cpus=64, memory=1000 * GB, gpus=8, gpu_memory=80 * GB)
ON_GPU = with_settings(Config(), {"model.dtype": "bfloat16", "finetune.gpus_per_worker": 1})
ON_CPU = with_settings(Config(), {"model.dtype": "bfloat16", "finetune.gpus_per_worker": 0})


@pytest.mark.parametrize(("dtype", "of_each"), [("float32", 16), ("model", 8)])
def test_a_learned_number_takes_four_times_its_bytes(dtype, of_each):
    config = FinetuneConfig(dtype=dtype)
    assert training_bytes(OLMOE, 24, dtype="bfloat16", config=config) == 24 * OLMOE.expert_parameters * of_each


@pytest.mark.parametrize(("num_workers", "of_own"), [(0, 24), (1, 24), (2, 12), (5, 5), (64, 1)])
def test_workers_share_out_the_optimisers_two_means_by_expert(num_workers, of_own):
    config = FinetuneConfig(num_workers=num_workers)
    numbers = OLMOE.expert_parameters
    assert training_bytes(OLMOE, 24, dtype="bfloat16", config=config) == numbers * 4 * (2 * 24 + 2 * of_own)


def test_all_that_fits_is_left_as_it_is():
    assert Room(model=OLMOE, nodes=[H100]).to_train(ON_GPU, 300, may_spread=True) == ON_GPU.finetune
    assert Room(model=OLMOE, nodes=[Node(cpus=2, memory=24 << 30)]).to_train(ON_CPU, 24, may_spread=True)


def test_a_worker_gets_the_gpus_that_its_training_needs_unless_their_number_was_given():
    room = Room(model=OLMOE, nodes=[H100])
    assert room.to_train(ON_GPU, 1000, may_spread=True).gpus_per_worker == 2  # 13.8 + 100.7 GB
    with pytest.raises(InputError, match=r"got 80\.0 GB on the GPUs of a worker, expected 114\.5 GB"):
        room.to_train(ON_GPU, 1000, may_spread=False)


def test_what_has_no_room_in_memory_is_refused_with_its_parts():
    room = Room(model=OLMOE, nodes=[Node(cpus=2, memory=24 << 30)])
    with pytest.raises(
        InputError, match=r"fine-tuning of 200 experts: got 23\.8 GB on a node, expected 34\.0 GB: 13\.8 "
    ):
        room.to_train(ON_CPU, 200, may_spread=True)
    assert replace(room, may_grow=True).to_train(ON_CPU, 200, may_spread=True) == ON_CPU.finetune


def test_a_worker_of_a_sharded_training_needs_room_for_its_part_of_the_weights():
    node = Node(cpus=2, memory=20 << 30)
    config = with_settings(ON_CPU, {"finetune.num_workers": 4})
    with pytest.raises(InputError, match=r"13\.8 for the weights"):
        Room(model=OLMOE, nodes=[node]).to_train(config, 100, may_spread=True)
    sharded = with_settings(config, {"finetune.shard": "fsdp"})
    assert Room(model=OLMOE, nodes=[node]).to_train(sharded, 100, may_spread=True) == sharded.finetune
    with pytest.raises(InputError, match=r"3\.5 for the weights.*raise finetune\.num_workers"):
        Room(model=OLMOE, nodes=[node]).to_train(sharded, 300, may_spread=True)


@settings(max_examples=50)
@given(st.integers(0, 1024), st.integers(1, 2000), st.integers(1, 8), st.integers(8, 180))
def test_more_experts_never_need_less(num_experts, memory, gpus, gpu_memory):
    node = Node(cpus=8, memory=memory * GB, gpus=gpus, gpu_memory=gpu_memory * GB)
    for config in (ON_CPU, ON_GPU):
        room = Room(model=OLMOE, nodes=[node])
        try:
            more = room.to_train(config, num_experts, may_spread=True)
        except InputError:
            continue
        fewer = room.to_train(config, num_experts // 2, may_spread=True)
        assert fewer.gpus_per_worker <= more.gpus_per_worker <= max(gpus, 1)
