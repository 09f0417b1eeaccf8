"""Tiny models whose experts are kept as codes, and plain ones with the weights that the codes stand for: their oracle."""

from __future__ import annotations

import tempfile

import pytest
import torch
from families import build
from transformers import PreTrainedModel

from moe_ray.config.model import ModelConfig
from moe_ray.models.expert_codes import codes_of
from moe_ray.models.loading import load_model
from moe_ray.models.moe_layers import find_moe_layers

METHODS = ("int8", "4bit")


def quantised(family: str, method: str) -> PreTrainedModel:
    """The family's tiny model, written and read again with its experts as codes, in float32 beside them."""
    if method == "4bit":
        pytest.importorskip("bitsandbytes", reason="moe-ray[quantised] is not installed")
    with tempfile.TemporaryDirectory() as folder:
        build(family).save_pretrained(folder)
        return load_model(ModelConfig(path=folder, quantisation=method), device="cpu")


def twin_of(model: PreTrainedModel, family: str) -> PreTrainedModel:
    """The family's tiny model with the weights that the codes of `model` stand for, as plain tensors."""
    twin = build(family)
    with torch.no_grad():
        for layer, own in zip(find_moe_layers(model), find_moe_layers(twin), strict=True):
            for name, codes in codes_of(layer.experts).items():
                own.expert_tensors()[name].copy_(codes.all_weights())
    return twin


def bytes_of_experts(model: PreTrainedModel) -> int:
    """Bytes of the matrices of all experts, or of their codes and scales; biases are left out."""
    return sum(
        tensor.numel() * tensor.element_size()
        for layer in find_moe_layers(model)
        for name, tensor in layer.experts.named_parameters()
        if not name.endswith("_bias")
    )
