"""A process that runs trials starts each from the loaded weights, and notices where one left something behind."""

import pytest
import torch

from moe_ray.config.model import ModelConfig
from moe_ray.orchestration.cluster import model_process
from moe_ray.orchestration.cluster.model_process import BaseModel, quiet_and_threaded


@pytest.fixture(autouse=True)
def threads_restored():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize(("num_processes", "threads"), [(1, 12), (4, 3), (5, 2), (12, 1), (40, 1)])
def test_processes_share_the_cores_and_each_has_one_at_least(num_processes, threads, monkeypatch):
    monkeypatch.setattr(model_process.os, "cpu_count", lambda: 12)
    quiet_and_threaded(num_processes)
    assert torch.get_num_threads() == threads


@pytest.mark.needs_ray  # which process_device would start
@pytest.mark.filterwarnings("default")
def test_any_number_that_a_trial_left_changed_is_noticed_and_none_where_there_is_none(
    ray_cluster, untrained_model_path
):
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
