"""Router masks: route tokens through allowed experts only.

Two hooks a layer, both family-independent. Around the router, a `TorchFunctionMode` lowers the logits of disallowed
experts as they leave the router's linear map, before softmax, sigmoid, groups or top-k see them, so the family's own
rule chooses among and normalises over the allowed experts. Before the experts module, whatever disallowed choice is
left (a layer with fewer allowed experts than a token uses) gets weight 0 and the id of an allowed expert.

Policies. *Empty layer* (no allowed expert): routes naturally. *Short layer*: its tokens use the allowed experts only.

Shape suffixes: T tokens, K experts per token, L MoE layers, E experts.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from moe_ray.errors import InputError
from moe_ray.moe_layers import MoELayer, find_moe_layers, routing_of_call
from moe_ray.selection import Mask

_LOWERED = -1e30
"""Replaces a disallowed expert's logit: finite, so that no family's arithmetic makes a NaN of it."""


class _MaskedLinear(TorchFunctionMode):
    """Lowers disallowed columns of every linear map whose output has one column per expert."""

    def __init__(self, allowed_E: Tensor) -> None:
        super().__init__()
        self.allowed_E = allowed_E

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        if func is F.linear and result.shape[-1] == len(self.allowed_E):
            lowered = max(_LOWERED, torch.finfo(result.dtype).min / 4)
            return torch.where(self.allowed_E, result, lowered)
        return result


class _LayerMask:
    """The mask of one layer, as hooks."""

    def __init__(self, layer: MoELayer, allowed_E: Tensor) -> None:
        self.layer = layer
        self.allowed_E = allowed_E
        self.first_allowed = int(allowed_E.nonzero()[0])
        self.num_routed = 0
        self._modes: list[_MaskedLinear] = []

    def before_router(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        mode = _MaskedLinear(self.allowed_E)
        mode.__enter__()  # type: ignore[no-untyped-call]
        self._modes.append(mode)

    def after_router(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        if self._modes:
            self._modes.pop().__exit__(None, None, None)  # type: ignore[no-untyped-call]

    def before_experts(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        hidden, index_TK, weights_TK = routing_of_call(self.layer, args, kwargs)
        disallowed_TK = ~self.allowed_E[index_TK]
        self.num_routed += len(index_TK)
        index_TK = index_TK.masked_fill(disallowed_TK, self.first_allowed)
        weights_TK = weights_TK.masked_fill(disallowed_TK, 0.0)
        rest = [*args, *kwargs.values()][3:]
        return (hidden, index_TK, weights_TK, *rest), {}


@contextmanager
def route_through(model: nn.Module, mask_LE: Mask) -> Iterator[None]:
    """Tokens may be routed only to the experts of `mask_LE` inside this context.

    Keep the context open through `backward` as well: activation checkpointing runs the forward again there.

    Args:
        model: a transformers MoE model.
        mask_LE: (L, E) bool, True = may be routed; a layer with none routes naturally.

    Raises:
        InputError: the mask has another shape than the model's layers and experts, allows nothing at all, or was not
            applied by any forward pass inside the context.
    """
    moe_layers = find_moe_layers(model)
    expected = (len(moe_layers), moe_layers.num_experts)
    if tuple(mask_LE.shape) != expected:
        raise InputError(f"expert mask: got shape {tuple(mask_LE.shape)}, expected (layers, experts) = {expected}")
    if not mask_LE.any():
        raise InputError("expert mask allows no expert in any layer; it would do nothing; lower selection.threshold")
    hooks = []
    with ExitStack() as stack:
        for layer, row in zip(moe_layers, mask_LE, strict=True):
            if row.any():
                device = next(layer.experts.parameters()).device
                hook = _LayerMask(layer, torch.as_tensor(row, dtype=torch.bool, device=device))
                hooks.append(hook)
                _attach(stack, hook)
        yield
    if not any(hook.num_routed for hook in hooks):
        raise InputError("expert mask was never applied: no forward pass ran inside route_through")


def _attach(stack: ExitStack, hook: _LayerMask) -> None:
    router, experts = hook.layer.router, hook.layer.experts
    handles = [
        router.register_forward_pre_hook(hook.before_router),
        router.register_forward_hook(hook.after_router, always_call=True),
        experts.register_forward_pre_hook(hook.before_experts, with_kwargs=True),
    ]
    for handle in handles:
        stack.callback(handle.remove)
    for bias in hook.layer.selection_biases():
        stack.enter_context(_lowered_bias(bias, hook.allowed_E))


@contextmanager
def _lowered_bias(bias: Tensor, allowed_E: Tensor) -> Iterator[None]:
    """A selection bias that keeps disallowed experts out, put back bit for bit afterwards.

    A group of experts is chosen by the sum of its two best scores, each a sigmoid (0 to 1) plus bias. Lowering by two
    spans of what allowed experts can reach ranks groups with two allowed experts before those with one before those with
    none, and is small enough for groups of one rank to keep their order in float32.
    """
    original = bias.detach().clone()
    allowed = bias.detach()[allowed_E.view_as(bias)]
    lowered = 2 * allowed.min() - allowed.max() - 3
    with torch.no_grad():
        bias.copy_(torch.where(allowed_E.view_as(bias), bias, lowered))
    try:
        yield
    finally:
        with torch.no_grad():
            bias.copy_(original)
