"""A model with random weights whose router tells tokens apart, for measurements that need shapes and no meaning."""

from __future__ import annotations

import torch
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from moe_ray.models.moe_layers import find_moe_layers


def random_model(
    config: PreTrainedConfig, *, device: str, dtype: torch.dtype, experts_implementation: str = "", seed: int = 0
) -> PreTrainedModel:
    """Builds a model on its device, in eval mode.

    Router weights have a standard deviation of 1: with the library's small initial ones all logits are nearly equal, and
    every token is routed alike.

    Args:
        config: of any MoE family.
        device: where it is built.
        dtype: of its weights.
        experts_implementation: how the library runs experts; empty = its default.
        seed: of all weights; the global random state is set.
    """
    torch.manual_seed(seed)
    options = {"experts_implementation": experts_implementation} if experts_implementation else {}
    with torch.device(device):
        model: PreTrainedModel = AutoModelForCausalLM.from_config(config, dtype=dtype, **options)
    with torch.no_grad():
        for layer in find_moe_layers(model):
            torch.nn.init.normal_(layer.router.get_parameter("weight"), std=1.0)
    return model.eval()
