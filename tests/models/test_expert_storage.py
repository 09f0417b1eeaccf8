"""The seam through which experts' weights are read and written."""

from __future__ import annotations

import pytest
import torch
from families import build

from moe_ray.models.expert_storage import local_part, storage_of
from moe_ray.models.moe_layers import find_moe_layers

OTHER = 1  # an expert beside the one that is written


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_is_written_is_read_and_no_other_expert_changes(dtype):
    layer = find_moe_layers(build("olmoe", dtype=dtype))[1]
    storage = storage_of(layer)
    other = {name: tensor.clone() for name, tensor in storage.read(OTHER).items()}
    new = {name: torch.randn(tensor.shape) for name, tensor in storage.read(0).items()}
    storage.write(0, new)
    assert storage.dtypes() == dict.fromkeys(new, dtype)
    for name, tensor in storage.read(0).items():
        assert torch.equal(tensor, new[name].to(dtype))
        assert torch.equal(storage.read(OTHER)[name], other[name])


def test_weights_that_are_read_are_the_models_own():
    layer = find_moe_layers(build("olmoe"))[0]
    for name, tensor in layer.expert_tensors().items():
        assert storage_of(layer).read(3)[name].data_ptr() == tensor[3].data_ptr()
        assert local_part(tensor) is tensor
        assert torch.equal(local_part(tensor, 3), tensor[3])
