"""A process that runs trials starts each from the loaded weights, and notices where one left something behind."""

import pytest
import torch

from moe_ray.config.model import ModelConfig
from moe_ray.orchestration.cluster.model_process import BaseModel


@pytest.fixture(autouse=True)
def threads_restored():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.mark.slow
def test_any_number_that_a_trial_left_changed_is_noticed_and_none_where_there_is_none(untrained_model_path):
    base = BaseModel(ModelConfig(path=str(untrained_model_path)), 1)
    base.check()
    tensors = [base.model.lm_head.weight, base.model.model.layers[1].mlp.experts.down_proj]
    for tensor in tensors:
        with torch.no_grad():
            kept = tensor.flatten()[0].item()
            tensor.view(-1)[0] = kept + 1.0
            with pytest.raises(RuntimeError, match="a fault of ours"):
                base.check()
            tensor.view(-1)[0] = kept
    base.check()
