"""Groups of a model's parameters by what they do: all of them, those of attention, those of the routers.

Found by structure, as experts and routers are, never by model type.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

from torch import nn

from moe_ray.errors import InputError
from moe_ray.models.expert_codes import codes_of
from moe_ray.models.moe_layers import find_moe_layers

ParameterGroup = Literal["all", "attention", "router"]

Parameters = Mapping[str, nn.Parameter]
"""Parameters by name."""


def parameters_of(model: nn.Module, group: ParameterGroup) -> dict[str, nn.Parameter]:
    """The group's parameters by name, in the model's order.

    Args:
        model: a transformers MoE model.
        group: all; attention = of every module whose class is called `…Attention`, its norms and projections included;
            router = what the router modules of the MoE layers hold themselves.

    Raises:
        InputError: the model has none, or keeps experts as codes where all are asked for.
    """
    if group == "all":
        if any(codes_of(layer.experts) for layer in find_moe_layers(model)):
            raise InputError(
                "full fine-tuning writes all weights, but experts are kept as codes; set model.quantisation=none, or leave "
                "full out of compare.names"
            )
        return dict(model.named_parameters())
    modules: list[nn.Module] = (
        [module for module in model.modules() if type(module).__name__.endswith("Attention")]
        if group == "attention"
        else [layer.router for layer in find_moe_layers(model)]
    )
    # A router module may be the one that holds the experts too; its own numbers are the router's.
    chosen = {id(tensor) for module in modules for tensor in module.parameters(recurse=group == "attention")}
    found = {name: tensor for name, tensor in model.named_parameters() if id(tensor) in chosen}
    if not found:
        raise InputError(
            f"{type(model).__name__} has no {group} parameters that moe-ray can find; leave {group}_only out of "
            "compare.names"
        )
    return found


def nearest_in_number(parameters: Parameters, target: int) -> dict[str, nn.Parameter]:
    """Some of the parameters whose numbers together are about as many as `target`; all of them where they are too few.

    Tensors of all depths are taken: first the first one, then the one in the middle, then those in the middle of either
    half, and so on, each where it brings the sum nearer to the target. The sum is then off by at most half a tensor, and
    there is at least one.

    Args:
        parameters: to choose from.
        target: numbers.
    """
    names = list(parameters)
    # By the digits of their positions, lowest first: any beginning of this order is spread over the whole.
    bits = max(1, (len(names) - 1).bit_length())
    order = sorted(range(len(names)), key=lambda position: f"{position:0{bits}b}"[::-1])
    chosen: set[str] = set()
    total = 0
    for position in order:
        size = parameters[names[position]].numel()
        if abs(total + size - target) < abs(total - target):
            chosen.add(names[position])
            total += size
    if not chosen:
        chosen = {min(names, key=lambda name: parameters[name].numel())}
    return {name: parameter for name, parameter in parameters.items() if name in chosen}
