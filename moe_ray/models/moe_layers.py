"""Where a model keeps its experts and its routers: the one module that knows architectures.

transformers 5 gives almost every family an experts module, called as
`experts(hidden_states, top_k_index, top_k_weights)`, whose weights are tensors with the experts in the first dimension,
beside a router module that computes logits by a linear map to `num_experts`. Both are found by that structure, not by
model type. tests/moe_families.py lists the families that keep experts in another way; they are refused.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from moe_ray.errors import InputError
from moe_ray.models.expert_codes import QuantisedExperts, codes_of

_ROUTER_NAMES = ("gate", "router")
_GROUP_NAMES = ("num_group", "n_group", "num_groups", "n_groups", "num_expert_group")
_SELECTION_BIAS_NAMES = ("correction_bias", "expert_bias")
_WEIGHT_TYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


@dataclass(frozen=True, kw_only=True)
class MoELayer:
    """One decoder layer with experts.

    Attributes:
        layer: decoder layer index in the model.
        name: the experts module's path in the model.
        experts: the module that receives `(hidden_states, top_k_index, top_k_weights)`.
        block: the module that holds the experts and their router.
        router: the module whose linear map gives the router logits.
        num_experts: experts of the layer.
        num_experts_per_tok: the router's k.
        num_logits: numbers that the router's linear map gives for a token: one per expert, which come first, and one
            per shared expert where a family weighs those there too.
    """

    layer: int
    name: str
    experts: nn.Module
    block: nn.Module
    router: nn.Module
    num_experts: int
    num_experts_per_tok: int
    num_logits: int

    def expert_tensors(self) -> dict[str, nn.Parameter]:
        """The experts module's own parameters that have one slice per expert, by name.

        Raises:
            InputError: the module keeps its weights in another form, or as the codes of a quantisation.
        """
        if codes_of(self.experts):
            raise InputError(
                f"{self.name}: its experts are kept as codes, and what needs their whole tensors cannot use them; set "
                "model.quantisation=none"
            )
        return self._plain_tensors()

    def expert_stacks(self) -> dict[str, nn.Parameter | QuantisedExperts]:
        """What the family's forward takes slices of, by name: `expert_tensors`, or what stands in for codes.

        Raises:
            InputError: as `expert_tensors`, save for experts that `model.quantisation` keeps as codes.
        """
        coded = {name: QuantisedExperts(codes) for name, codes in codes_of(self.experts).items()}
        plain = {} if self.expert_modules() else self._plain_tensors(required=not coded)
        return {**coded, **plain}

    def _plain_tensors(self, *, required: bool = True) -> dict[str, nn.Parameter]:
        tensors = {
            name: parameter
            for name, parameter in self.experts.named_parameters(recurse=False)
            if parameter.dim() >= 1 and parameter.shape[0] == self.num_experts
        }
        if required and not tensors and not self.expert_modules():
            raise InputError(
                f"{self.name} ({type(self.experts).__name__}) has no tensors with one slice per expert, so its routing can "
                "be counted and masked, but its experts cannot be trained or saved; choose another model.path for that"
            )
        codes = {str(tensor.dtype) for tensor in tensors.values() if tensor.dtype not in _WEIGHT_TYPES}
        if codes:
            raise InputError(
                f"{self.name} ({type(self.experts).__name__}) keeps its experts quantised, as {' and '.join(sorted(codes))} "
                "codes with scales, so its routing can be counted and masked, but its experts cannot be trained or saved; "
                "choose a model.path with weights in bfloat16, float16 or float32 for that"
            )
        return tensors

    def expert_modules(self) -> tuple[nn.Module, ...]:
        """One module per expert, where they are modules of their own; empty where they share fused tensors."""
        if not isinstance(self.experts, nn.ModuleList | nn.ModuleDict):
            return ()
        modules = [module for module in self.experts.children() if next(module.parameters(), None) is not None]
        shapes = {tuple((name, p.shape) for name, p in module.named_parameters()) for module in modules}
        return tuple(modules) if len(modules) == self.num_experts and len(shapes) == 1 else ()

    def refuse_offloaded(self) -> None:
        """Refuses a layer whose experts are nowhere: they come only for a forward pass.

        Raises:
            InputError: their weights are offloaded.
        """
        if next(self.experts.parameters()).is_meta:
            raise InputError(
                f"{self.name}: its weights are offloaded, so its routing can be counted, but it cannot be masked, trained "
                "or saved; load the model with a device_map of devices that have room for all of it"
            )

    def tensors_of(self, expert: int) -> dict[str, Tensor]:
        """One expert's weights by name; they share memory with the model's own, but for those dequantised from codes.

        Raises:
            InputError: they are offloaded.
        """
        self.refuse_offloaded()
        modules = self.expert_modules()
        if modules:
            return dict(modules[expert].named_parameters())
        return {name: tensor[expert] for name, tensor in self.expert_stacks().items()}

    def router_tensors(self) -> dict[str, nn.Parameter]:
        """The parameters of the linear map that gives the router's logits, by name."""
        return {
            name: parameter
            for name, parameter in self.router.named_parameters(recurse=False)
            if parameter.shape[0] == self.num_logits and not name.endswith(_SELECTION_BIAS_NAMES)
        }

    def selection_biases(self) -> list[Tensor]:
        """One number per expert that is added to scores for the choice only, wherever in the block a family keeps it."""
        return [
            tensor
            for name, tensor in [*self.block.named_parameters(), *self.block.named_buffers()]
            if name.endswith(_SELECTION_BIAS_NAMES) and tensor.numel() == self.num_experts
        ]

    def has_expert_groups(self) -> bool:
        """The router chooses groups of experts first, so a token may find too few allowed ones in those it chose."""
        return any(getattr(self.router, name, None) not in (None, 0, 1) for name in _GROUP_NAMES)


class MoELayers(tuple[MoELayer, ...]):
    """The MoE layers of a model, by ascending layer index."""

    @property
    def layers(self) -> tuple[int, ...]:
        """Decoder layer indices."""
        return tuple(item.layer for item in self)

    @property
    def num_experts(self) -> int:
        """Experts per layer."""
        return self[0].num_experts

    @property
    def num_experts_per_tok(self) -> int:
        """The router's k."""
        return self[0].num_experts_per_tok

    def row_of(self, layer: int) -> int:
        """The row of a decoder layer in every `(layers, experts)` array."""
        return self.layers.index(layer)

    def check_shape(self, mask_LE: npt.NDArray[np.bool_], name: str) -> None:
        """Refuses a mask of other layers or experts, which would silently be about others than it was made for.

        Raises:
            InputError: its shape is not (layers, experts).
        """
        got, expected = tuple(mask_LE.shape), (len(self), self.num_experts)
        if got != expected:
            raise InputError(f"{name}: got shape {got}, expected (layers, experts) = {expected}")


def find_moe_layers(model: nn.Module) -> MoELayers:
    """The MoE layers of a transformers model.

    Raises:
        InputError: the model has no experts module, keeps its experts in a form moe-ray does not know, its layers differ
            in their number of experts, or PEFT has wrapped it or one of its modules.
    """
    _refuse_peft(model)
    found = [_describe(model, name, module) for name, module in _experts_modules(model)]
    if not found:
        raise InputError(
            f"{type(model).__name__} has no Mixture-of-Experts layer that moe-ray can read{_what_is_there(model)}; expected "
            "a transformers model with an experts module that is called as (hidden_states, top_k_index, top_k_weights) and "
            "says its num_experts (OLMoE, Mixtral, Qwen-MoE, DeepSeek, GPT-OSS, …); choose another model.path"
        )
    found.sort(key=lambda item: item.layer)
    sizes = {(item.num_experts, item.num_experts_per_tok) for item in found}
    if len(sizes) > 1 or len({item.layer for item in found}) < len(found):
        raise InputError(
            f"{type(model).__name__}: got MoE layers with (experts, experts per token) "
            f"{[(item.name, item.num_experts, item.num_experts_per_tok) for item in found][:6]}, expected one per decoder "
            "layer, all with the same number of experts and of experts per token; choose another model.path"
        )
    return MoELayers(found)


def _refuse_peft(model: nn.Module) -> None:
    # A wrapper has another forward, saves only its own files, and hides experts and routers inside modules of its own.
    for name, module in model.named_modules():
        if type(module).__module__.partition(".")[0] == "peft":
            raise InputError(
                f"got a model with a {type(module).__name__} of PEFT{f' at {name!r}' if name else ''}, expected a plain "
                "transformers model; put the adapter into the weights first, with model.merge_and_unload()"
            )


def _experts_modules(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    for name, module in model.named_modules():
        count = getattr(module, "num_experts", None)
        is_named_so = isinstance(count, int) and count > 1 and type(module).__name__.endswith("Experts")
        # self, hidden_states, top_k_index, top_k_weights
        if is_named_so and len(inspect.signature(type(module).forward).parameters) >= 4:
            yield name, module


def _what_is_there(model: nn.Module) -> str:
    for name, module in model.named_modules():
        if re.search(r"Experts$|MoE$|Moe$", type(module).__name__):
            return f": {name} is a {type(module).__name__} of another kind"
    return ""


def _describe(model: nn.Module, name: str, experts: nn.Module) -> MoELayer:
    numbers = re.findall(r"(?:^|\.)(\d+)(?=\.)", name)
    parent_name, _, own_name = name.rpartition(".")
    if not numbers:
        raise InputError(
            f"experts module {name!r} is not inside a numbered decoder layer; this family is not supported"
        )
    num_experts = int(getattr(experts, "num_experts"))  # noqa: B009 (nn.Module types attributes as Tensor | Module)
    block = model.get_submodule(parent_name)
    path, router, num_logits = _find_router(block, own_name, num_experts, name)
    return MoELayer(
        layer=int(numbers[0]),
        name=name,
        experts=experts,
        block=block,
        router=router,
        num_experts=num_experts,
        num_experts_per_tok=_experts_per_token(model, _ancestors(block, path), name),
        num_logits=num_logits,
    )


def _find_router(block: nn.Module, experts_name: str, num_experts: int, name: str) -> tuple[str, nn.Module, int]:
    """The smallest module beside the experts with a `(num_experts, hidden)` weight: its path, itself, that weight's rows.

    A router that weighs shared experts too says how many, and has a row for each of them. One with more rows than that
    chooses something that is no expert, such as to skip the layer, so what the experts receive is not what it chose.
    """
    candidates: list[tuple[str, nn.Module, int]] = []
    for path, module in block.named_modules():
        if path.split(".")[0] == experts_name or "shared" in path:
            continue
        num_shared = getattr(module, "n_shared_experts", None)
        num_logits = num_experts + (num_shared if isinstance(num_shared, int) else 0)
        rows = {w.shape[0] for w in module.parameters(recurse=False) if w.dim() == 2}
        candidates += [(path, module, size) for size in sorted({num_experts, num_logits} & rows)]
    named = [item for item in candidates if any(part in _ROUTER_NAMES for part in item[0].split("."))]
    chosen = named or candidates
    if len(chosen) != 1:
        raise InputError(
            f"{name}: got router candidates {[path for path, _, _ in chosen]}, expected exactly one module with a "
            f"({num_experts}, hidden) weight beside the experts; this family is not supported"
        )
    return chosen[0]


def _ancestors(block: nn.Module, path: str) -> Iterator[nn.Module]:
    """The module at the path inside the block, and those around it up to the block itself."""
    while path:
        yield block.get_submodule(path)
        path = path.rpartition(".")[0]
    yield block


def _experts_per_token(model: nn.Module, around_router: Iterator[nn.Module], name: str) -> int:
    config: Any = getattr(model, "config", None)
    text_config = config.get_text_config() if hasattr(config, "get_text_config") else config
    of_module = ("top_k", "num_experts_per_tok")
    names = ("num_experts_per_tok", "num_experts_per_token", "moe_topk", "moe_k", "top_k_experts")
    for source, attributes in (*((module, of_module) for module in around_router), (text_config, names)):
        for attribute in attributes:
            value = getattr(source, attribute, None)
            # A configuration may give one number for all layers, or a list with one for each, mostly the same.
            if isinstance(value, list) and len(set(value)) == 1:
                value = value[0]
            if isinstance(value, int):
                return value
    raise InputError(f"{name}: neither the router nor the configuration says how many experts a token uses")


def uncompiled() -> AbstractContextManager[None]:
    """In this context compiled models run uncompiled.

    `torch.compile` ignores hooks that modules got after it compiled them, so a mask or a counter would silently do nothing.
    """
    stance: AbstractContextManager[None] = torch.compiler.set_stance("force_eager")
    return stance


def routing_of_call(layer: MoELayer, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> tuple[Tensor, Tensor, Tensor]:
    """`(hidden_states, top_k_index, top_k_weights)` of a call of an experts module, whatever the names.

    Raises:
        InputError: the call does not follow the library's experts interface.
    """
    values = [*args, *kwargs.values()]
    if len(values) >= 3 and all(isinstance(value, Tensor) for value in values[:3]):
        index = values[1]
        if not index.is_floating_point() and index.dim() == 2 and index.shape == values[2].shape:
            return values[0], index, values[2]
    raise InputError(
        f"{layer.name} was called in another way than (hidden_states, top_k_index, top_k_weights); "
        "this family is not supported"
    )
