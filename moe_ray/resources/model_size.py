"""How large a model is, from its configuration and the headers of its files; no weight is read."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal

from moe_ray.config.model import ModelConfig
from moe_ray.config.quantisation import bytes_per_number
from moe_ray.errors import InputError

BYTES: dict[str, int] = {"float32": 4, "bfloat16": 2, "float16": 2}
"""Bytes of a number by type."""

_STORED = {"F32": "float32", "BF16": "bfloat16", "F16": "float16"}


@dataclass(frozen=True, kw_only=True)
class ModelSize:
    """Numbers of a MoE model.

    Attributes:
        name: for people.
        parameters: all of them.
        experts: of all MoE layers together.
        expert_parameters: of one expert.
        layers: decoder layers.
        hidden: width of the hidden state.
        vocabulary: tokens.
        own_dtype: the type that the checkpoint is stored in, where that is one a model computes in; else bfloat16.
        stored_bytes: of a quantised checkpoint, whose numbers are not `own_dtype`; None = it is not quantised.
        stored_as: how it is quantised.
        quantisation: that experts are loaded with.
    """

    name: str
    parameters: int
    experts: int
    expert_parameters: int
    layers: int = 0
    hidden: int = 0
    vocabulary: int = 0
    own_dtype: str = "float32"
    stored_bytes: int | None = None
    stored_as: str | None = None
    quantisation: Literal["none", "int8", "4bit"] = "none"

    def bytes_in(self, dtype: str) -> int:
        """Bytes of the weights where what is not quantised is in a type.

        Of quantised experts, those of two layers are counted in that type too: as many are there while they are read, and
        fewer while they compute.
        """
        if self.quantisation != "none":
            in_experts = self.experts * self.expert_parameters
            at_once = min(2, self.layers) * in_experts // max(1, self.layers)
            codes = in_experts * bytes_per_number(self.quantisation, self.hidden or 64)
            return (self.parameters - in_experts + at_once) * BYTES[dtype] + math.ceil(codes)
        if dtype == self.own_dtype and self.stored_bytes is not None:
            return self.stored_bytes
        return self.parameters * BYTES[dtype]


def size_of(model: Any, config: ModelConfig) -> ModelSize:
    """The numbers of a model that was built, on the meta device or any other.

    Args:
        model: a transformers MoE model.
        config: where it comes from.
    """
    from moe_ray.models.loading import stored_quantisation
    from moe_ray.models.moe_layers import find_moe_layers

    layers = find_moe_layers(model)
    first = layers[0]
    of_experts = sum(parameter.numel() for parameter in first.experts.parameters())
    text = model.config.get_text_config()
    stored_as = stored_quantisation(model.config)
    return ModelSize(
        name=config.path.rstrip("/").rpartition("/")[2],
        parameters=sum(parameter.numel() for parameter in model.parameters()),
        experts=len(layers) * layers.num_experts,
        expert_parameters=of_experts // first.num_experts,
        layers=int(text.num_hidden_layers),
        hidden=int(text.hidden_size),
        vocabulary=int(text.vocab_size),
        own_dtype=_own_dtype(model.config, config),
        stored_bytes=_stored_bytes(config) if stored_as else None,
        stored_as=stored_as,
        quantisation=config.quantisation,
    )


def _own_dtype(architecture: Any, config: ModelConfig) -> str:
    said = getattr(architecture, "dtype", None) or getattr(architecture.get_text_config(), "dtype", None)
    name = str(said).removeprefix("torch.")
    if name in BYTES:
        return name
    folder = config.local_folder()
    if folder is None:
        return "float32"
    from moe_ray.models.weight_files import stored_type

    return _STORED.get(stored_type(folder), "bfloat16")


def _stored_bytes(config: ModelConfig) -> int | None:
    folder = config.local_folder()
    if folder is None:
        return None
    from moe_ray.models.weight_files import bytes_in_memory

    try:
        return bytes_in_memory(folder)
    except InputError:
        return None
