"""A model with random weights whose router tells tokens apart, for measurements that need shapes and no meaning.

Shape suffixes: E experts, H hidden size.
"""

from __future__ import annotations

import torch
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from moe_ray.models.moe_layers import find_moe_layers


def random_model(
    config: PreTrainedConfig, *, device: str, dtype: torch.dtype, experts_implementation: str = "", seed: int = 0
) -> PreTrainedModel:
    """Builds a model on its device, in eval mode.

    Router weights have a standard deviation of 1/sqrt(hidden size), so that logits of normalised hidden states have one of
    about 1, as in trained models. With the library's smaller initial ones every token is routed nearly alike; with larger
    ones softmax gives weights of 1e-30, and a backward pass computes with denormal numbers, at a fraction of the speed.

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
            weight_EH = layer.router.get_parameter("weight")
            torch.nn.init.normal_(weight_EH, std=weight_EH.shape[1] ** -0.5)
    return model.eval()
