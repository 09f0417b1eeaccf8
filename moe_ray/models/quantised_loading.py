"""Experts quantised while a checkpoint is read: one fused tensor after another, so that the model is never whole.

transformers' own ways with bitsandbytes and torchao quantise linear layers, and leave fused experts as they are: 93% of
OLMoE. This registers another with its loader, which gives it every fused tensor as soon as it is read and merged.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.core_model_loading import ConversionOps
from transformers.quantizers.auto import register_quantization_config, register_quantizer
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from moe_ray.config.quantisation import Quantisation, bytes_per_number
from moe_ray.errors import InputError
from moe_ray.models.expert_codes import keep_as_codes
from moe_ray.models.moe_layers import find_moe_layers

_NAME = "moe_ray_experts"


@register_quantization_config(_NAME)
class ExpertQuantisation(QuantizationConfigMixin):  # type: ignore[misc]
    """What `from_pretrained` is given: the experts of MoE layers as codes.

    Args:
        method: of the quantisation.
    """

    def __init__(self, method: Quantisation, **_: Any) -> None:
        self.quant_method: Any = _NAME
        self.method: Quantisation = method


def fused_tensors(model: nn.Module) -> dict[str, tuple[nn.Module, str]]:
    """The tensors of a model that are quantised, by name: experts module and the name there.

    They are the fused matrices (experts, …, …); biases stay as they are.

    Raises:
        InputError: the model has no experts that can be.
    """
    found = {
        f"{layer.name}.{name}": (layer.experts, name)
        for layer in find_moe_layers(model)
        for name, tensor in layer.experts.named_parameters(recurse=False)
        if tensor.dim() == 3 and tensor.shape[0] == layer.num_experts
    }
    if not found:
        raise InputError(
            f"model.quantisation: got a {type(model).__name__}, whose experts are modules of their own, expected fused "
            "tensors with one slice per expert; set model.quantisation=none"
        )
    return found


class _Quantise(ConversionOps):  # type: ignore[misc]
    """The last step of the loader's conversion of a fused tensor."""

    def __init__(self, fused: dict[str, tuple[nn.Module, str]], method: Quantisation) -> None:
        self._fused, self._method = fused, method

    @torch.no_grad()
    def convert(
        self, input_dict: dict[str, Any], *, full_layer_name: str, missing_keys: set[str], **_: Any
    ) -> dict[str, Tensor]:
        """Keeps the tensors as codes; those that are of other shapes are left to the loader, which reports them."""
        left: dict[str, Tensor] = {}
        for name, value in input_dict.items():
            weights = value[0] if isinstance(value, list) else value
            experts, own_name = self._fused[name]
            if weights.shape != getattr(experts, own_name).shape:
                left[name] = weights
                del self._fused[name]
                continue
            keep_as_codes(experts, own_name, weights, self._method)
            # The loader would draw what it takes for missing.
            experts.__dict__["_is_hf_initialized"] = True
            missing_keys.discard(name)
        return left


@register_quantizer(_NAME)
class _ExpertQuantiser(HfQuantizer):  # type: ignore[misc]
    """Tells the loader which tensors to give to `_Quantise`."""

    quantization_config: ExpertQuantisation
    _fused: dict[str, tuple[nn.Module, str]]

    def _process_model_before_weight_loading(self, model: PreTrainedModel, **_: Any) -> PreTrainedModel:
        self._fused = fused_tensors(model)
        return model

    def param_needs_quantization(self, model: PreTrainedModel, param_name: str, **_: Any) -> bool:
        return param_name in self._fused

    def get_quantize_ops(self) -> ConversionOps:
        return _Quantise(self._fused, self.quantization_config.method)

    @property
    def quantized_element_size(self) -> float:
        return bytes_per_number(self.quantization_config.method, 1024)

    def is_serializable(self) -> bool:
        return False

    @property
    def is_trainable(self) -> bool:
        return True
