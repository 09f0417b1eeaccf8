"""How large a model is, known without its weights."""

from __future__ import annotations

import pytest
import torch
from families import build

from moe_ray.config.model import ModelConfig
from moe_ray.models.loading import build_without_weights
from moe_ray.models.weight_files import bytes_in_memory
from moe_ray.resources.model_size import ModelSize, size_of


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_numbers_are_those_of_the_checkpoint(dtype, tmp_path):
    build("olmoe", dtype=dtype).save_pretrained(tmp_path)
    config = ModelConfig(path=str(tmp_path))
    size = size_of(build_without_weights(config), config)
    own = str(dtype).removeprefix("torch.")
    assert (size.own_dtype, size.experts, size.layers) == (own, 16, 2)
    assert size.bytes_in(own) == bytes_in_memory(tmp_path)
    assert size.bytes_in("float32") == size.parameters * 4
    model = build("olmoe")
    experts = model.model.layers[0].mlp.experts
    assert size.expert_parameters == experts.gate_up_proj[0].numel() + experts.down_proj[0].numel()


def test_a_quantised_checkpoint_takes_what_its_files_hold():
    size = ModelSize(name="m", parameters=100, experts=4, expert_parameters=10, own_dtype="bfloat16", stored_bytes=120)
    assert (size.bytes_in("bfloat16"), size.bytes_in("float32")) == (120, 400)
