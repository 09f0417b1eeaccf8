"""Router masks: route tokens through allowed experts only.

Two hooks a layer, both family-independent. Around the router, a `TorchFunctionMode` lowers the logits of disallowed
experts as they leave the router's linear map, before softmax, sigmoid, groups or top-k see them, so the family's own
rule chooses among and normalises over the allowed experts. Before the experts module, whatever disallowed choice is
left (a layer with fewer allowed experts than a token uses) gets weight 0 and the id of an allowed expert.

Policies. *Empty layer* (no allowed expert): routes naturally. *Short layer*: its tokens use the allowed experts only; an
emptied row lets it route naturally (`experts.router_mask`). *Groups* (DeepSeek, GLM): groups with two allowed
experts are chosen before groups with one, and those before groups with none, since a group is ranked by its two best.

Shape suffixes: T tokens, K experts per token, L MoE layers, E experts.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from moe_ray.errors import InputError, NothingSelected
from moe_ray.experts import Mask
from moe_ray.models.moe_layers import MoELayer, find_moe_layers, routing_of_call, uncompiled

_LOWERED = -1e30
"""Replaces a disallowed expert's logit: finite, so that no family's arithmetic makes a NaN of it."""


class _EditedLogits(TorchFunctionMode):
    """Passes the output of every linear map that has one column per logit of the router through `edit`."""

    def __init__(self, num_logits: int, edit: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.num_logits, self.edit = num_logits, edit

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        # A hook on the router's output would come too late: families apply softmax and top-k inside the router's forward.
        result = func(*args, **(kwargs or {}))
        return self.edit(result) if func is F.linear and result.shape[-1] == self.num_logits else result


class _EditedRouter:
    """Edits one layer's router logits, as hooks on its router."""

    def __init__(self, layer: MoELayer, edit: Callable[[Tensor], Tensor]) -> None:
        self.layer, self.edit = layer, edit
        self.num_calls = 0
        # A stack, so that a call inside a call would end its own edit and not the outer one's.
        self._modes: list[_EditedLogits] = []

    def before(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        self.num_calls += 1
        self._modes.append(_EditedLogits(self.layer.num_logits, self.edit))
        self._modes[-1].__enter__()  # type: ignore[no-untyped-call]

    def after(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        # Called after errors too, and then perhaps without `before`: another hook may have failed first.
        if self._modes:
            self._modes.pop().__exit__(None, None, None)  # type: ignore[no-untyped-call]

    def attach(self, stack: ExitStack) -> None:
        """Adds the hooks; the stack removes them."""
        for handle in (
            self.layer.router.register_forward_pre_hook(self.before),
            self.layer.router.register_forward_hook(self.after, always_call=True),
        ):
            stack.callback(handle.remove)


class _LayerMask:
    """The mask of one layer: an edit of its logits, and a hook before its experts."""

    def __init__(self, layer: MoELayer, allowed_E: Tensor) -> None:
        self.layer, self.allowed_E = layer, allowed_E
        # Logits beyond the experts are those of shared experts, which every token uses; they are not the mask's.
        self.kept_logits = F.pad(allowed_E, (0, layer.num_logits - layer.num_experts), value=True)
        self.first_allowed = int(allowed_E.nonzero()[0])
        self.num_allowed = int(allowed_E.sum())
        self.num_routed = self.num_lowered = 0
        # On the device, and read once at the end: a number read in every layer would make the host wait for the device.
        self.num_strays = torch.zeros((), dtype=torch.long, device=allowed_E.device)

    def lower(self, logits: Tensor) -> Tensor:
        self.num_lowered += 1
        # In float16 -1e30 is -inf; a quarter of its least number leaves room for what a family subtracts.
        lowered = max(_LOWERED, torch.finfo(logits.dtype).min / 4)
        return torch.where(self.kept_logits, logits, lowered)

    def before_experts(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        hidden, index_TK, weights_TK = routing_of_call(self.layer, args, kwargs)
        if not self.num_lowered:
            raise InputError(
                f"{self.layer.name}: its router computes no linear map to {self.layer.num_logits} logits that moe-ray can "
                "see, so it cannot be masked; this family is not supported"
            )
        disallowed_TK = ~self.allowed_E[index_TK]
        self.num_routed += len(index_TK)
        # With fewer allowed experts than choices, or in a group that holds too few, the router cannot do better.
        if self.num_allowed >= index_TK.shape[1] and not self.layer.has_expert_groups():
            self.num_strays += disallowed_TK.sum()
        # The id as well as the weight: an expert at weight 0 would still run, and be counted by whoever watches the ids.
        index_TK = index_TK.masked_fill(disallowed_TK, self.first_allowed)
        weights_TK = weights_TK.masked_fill(disallowed_TK, 0.0)
        if self.num_allowed < index_TK.shape[1]:
            # At most `num_allowed` choices of a token are left; the rest, at weight 0, would be computed for nothing.
            # Stable: the allowed choices keep the router's order, and so does the sum over them.
            kept = disallowed_TK.long().argsort(dim=1, stable=True)[:, : self.num_allowed]
            index_TK, weights_TK = index_TK.gather(1, kept), weights_TK.gather(1, kept)
        rest = [*args, *kwargs.values()][3:]
        return (hidden, index_TK, weights_TK, *rest), {}

    def attach(self, stack: ExitStack) -> None:
        """Adds edit, hook and lowered biases; the stack undoes them."""
        _EditedRouter(self.layer, self.lower).attach(stack)
        handle = self.layer.experts.register_forward_pre_hook(self.before_experts, with_kwargs=True)
        stack.callback(handle.remove)
        for bias in self.layer.selection_biases():
            stack.enter_context(_lowered_bias(bias, self.allowed_E))


@contextmanager
def route_through(model: nn.Module, mask_LE: Mask) -> Iterator[None]:
    """Tokens may be routed only to the experts of `mask_LE` inside this context.

    Keep the context open through `backward` as well: activation checkpointing runs the forward again there.

    Args:
        model: a transformers MoE model.
        mask_LE: (L, E) bool, True = may be routed; a layer with none routes naturally.

    Raises:
        InputError: the mask has another shape than the model's layers and experts, allows nothing at all, or was not
            applied by any forward pass inside the context; or another mask is in force; or the router is of a kind that
            cannot be masked.
    """
    masks = []
    with ExitStack() as stack, uncompiled():
        for layer, allowed_E in _layers_with_experts(model, mask_LE):
            if any(isinstance(getattr(hook, "__self__", None), _LayerMask) for hook in _pre_hooks(layer)):
                raise InputError("another expert mask is in force; leave its route_through before entering a new one")
            masks.append(_LayerMask(layer, allowed_E))
        for mask in masks:
            mask.attach(stack)
        yield
    # Only where the context ended without an error: that one is what the caller must see.
    if not any(mask.num_routed for mask in masks):
        raise InputError("expert mask was never applied: no forward pass ran inside route_through")
    for mask in masks:
        if mask.num_strays:
            raise InputError(
                f"{mask.layer.name}: the router chose disallowed experts {int(mask.num_strays)} times though enough are "
                "allowed; how this family chooses is not known to moe-ray, so it cannot be masked"
            )


@contextmanager
def route_towards(model: nn.Module, mask_LE: Mask, *, boost: float) -> Iterator[None]:
    """Adds `boost` to the router logits of the experts of `mask_LE` inside this context; others stay reachable.

    Args:
        model: a transformers MoE model.
        mask_LE: (L, E) bool, True = boosted; a layer with none routes naturally.
        boost: in logits, before the family's softmax or sigmoid.

    Raises:
        InputError: as `route_through`.
    """
    routers = []
    with ExitStack() as stack, uncompiled():
        for layer, boosted_E in _layers_with_experts(model, mask_LE):
            router = _EditedRouter(layer, partial(_raised, by_E=boosted_E * boost))
            router.attach(stack)
            routers.append(router)
        yield
    if not any(router.num_calls for router in routers):
        raise InputError("router boost was never applied: no forward pass ran inside route_towards")


def _raised(logits: Tensor, by_E: Tensor) -> Tensor:
    return logits + F.pad(by_E, (0, logits.shape[-1] - len(by_E))).to(logits.dtype)


def _pre_hooks(layer: MoELayer) -> list[Any]:
    return list(layer.experts._forward_pre_hooks.values())


def _layers_with_experts(model: nn.Module, mask_LE: Mask) -> list[tuple[MoELayer, Tensor]]:
    """Layers with an expert in the mask, each with its row on the layer's device."""
    moe_layers = find_moe_layers(model)
    moe_layers.check_shape(mask_LE, "expert mask")
    if not mask_LE.any():
        raise NothingSelected(
            "expert mask allows no expert in any layer; it would do nothing; lower identify.threshold"
        )
    return [
        (layer, torch.as_tensor(row, dtype=torch.bool, device=next(layer.experts.parameters()).device))
        for layer, row in zip(moe_layers, mask_LE, strict=True)
        if row.any()
    ]


@contextmanager
def _lowered_bias(bias: Tensor, allowed_E: Tensor) -> Iterator[None]:
    """A selection bias that keeps disallowed experts out, put back bit for bit afterwards.

    A group of experts is chosen by the sum of its two best scores, each a sigmoid (0 to 1) plus bias. The lowered value
    ranks groups with two allowed experts before those with one before those with none; it is no lower than that needs, so
    that groups of one rank keep their order in float32.
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
