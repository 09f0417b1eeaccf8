"""What a process takes: weights once, sixteen bytes a learned number, and more for longer passes."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moe_ray.config.io import with_settings
from moe_ray.config.run import Config
from moe_ray.resources.model_size import ModelSize
from moe_ray.resources.nodes import GB
from moe_ray.resources.process_memory import largest_union, process_memory

OLMOE = ModelSize(
    name="OLMoE-1B-7B", parameters=6_919_161_856, experts=1024, expert_parameters=6_291_456, layers=16, hidden=2048,
    vocabulary=50304, own_dtype="bfloat16",
)  # fmt: skip
CONFIG = with_settings(Config(), {"model.dtype": "bfloat16"})


def test_weights_are_in_every_process_once_and_only_training_learns():
    capture, answers, training = process_memory(OLMOE, CONFIG, union=24, row_tokens=100)
    assert {row.weights for row in (capture, answers, training)} == {13_838_323_712}
    assert (capture.learned, answers.learned, training.learned) == (0, 0, 24 * 6_291_456 * 16)
    assert training.total == training.weights + training.learned + training.activations


@pytest.mark.parametrize("key", ["capture.tokens_per_forward", "evaluate.tokens_per_forward"])
def test_longer_passes_take_more(key):
    longer = with_settings(CONFIG, {key: 4 * 8192})
    before, after = (process_memory(OLMOE, config, union=1, row_tokens=9) for config in (CONFIG, longer))
    assert sum(row.activations for row in after) > sum(row.activations for row in before)


@settings(max_examples=50)
@given(st.integers(1, 200))
def test_the_largest_union_has_room_and_one_more_has_not(gigabytes):
    room = gigabytes * GB
    most = largest_union(OLMOE, CONFIG, room)
    assert 0 <= most <= OLMOE.experts
    training = process_memory(OLMOE, CONFIG, union=most, row_tokens=1)[2]
    assert most == 0 or training.weights + training.learned <= room
    more = process_memory(OLMOE, CONFIG, union=most + 1, row_tokens=1)[2]
    assert most == OLMOE.experts or more.weights + more.learned > room


def test_a_process_of_a_sharded_model_holds_its_part():
    spread = with_settings(CONFIG, {"model.num_shards": 4, "finetune.num_workers": 2, "finetune.shard": "fsdp"})
    capture, answers, training = process_memory(OLMOE, spread, union=24, row_tokens=100)
    assert (capture.weights, answers.weights) == (13_838_323_712 // 4,) * 2
    assert training.weights == 13_838_323_712 // 2
    room = 20 * GB
    more = (largest_union(OLMOE, spread, room), largest_union(OLMOE, with_settings(CONFIG, {}), room))
    assert more[0] > more[1]
