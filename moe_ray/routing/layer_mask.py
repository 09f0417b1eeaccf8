"""The mask of one MoE layer: two hooks, both family-independent.

Around the router, a `TorchFunctionMode` lowers the logits of disallowed experts as they leave the router's linear map,
before softmax, sigmoid, groups or top-k see them, so the family's own rule chooses among and normalises over the allowed
experts. Before the experts module, whatever disallowed choice is left (a layer with fewer allowed experts than a token
uses) gets weight 0 and the id of an allowed expert.

Shape suffixes: T tokens, K experts per token, E experts.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from moe_ray.errors import InputError
from moe_ray.models.moe_layers import MoELayer, routing_of_call

_LOWERED = -1e30
"""Replaces a disallowed expert's logit: finite, so that no family's arithmetic makes a NaN of it."""


COUNTS = "counts_routing"
"""Attribute of a hook on an experts module that counts what it sees, and must therefore come after a mask's."""


def has_mask(experts: nn.Module) -> bool:
    """Whether a mask is in force on an experts module."""
    return any(isinstance(getattr(hook, "__self__", None), LayerMask) for hook in experts._forward_pre_hooks.values())


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


@contextmanager
def function_modes_ended() -> Iterator[None]:
    """Ends, with the context, what the edits inside it have left in force on this thread.

    torch calls no hook after a KeyboardInterrupt or SystemExit in a module. What such a router leaves would edit every
    linear map of this width in every model of the process.
    """
    depth = torch._C._len_torch_function_stack()
    try:
        yield
    finally:
        while torch._C._len_torch_function_stack() > depth:
            torch._C._pop_torch_function_stack()


class EditedRouter:
    """Edits one layer's router logits, as hooks on its router."""

    def __init__(self, layer: MoELayer, edit: Callable[[Tensor], Tensor]) -> None:
        self.layer, self.edit = layer, edit
        self.num_calls = 0
        # A stack, so that a call inside a call would end its own edit and not the outer one's.
        self._modes: list[_EditedLogits] = []

    def before(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        """Begins to edit."""
        self.num_calls += 1
        self._modes.append(_EditedLogits(self.layer.num_logits, self.edit))
        self._modes[-1].__enter__()  # type: ignore[no-untyped-call]

    def after(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        """Ends it; called after errors too, and then perhaps without `before`: another hook may have failed first."""
        if self._modes:
            self._modes.pop().__exit__(None, None, None)  # type: ignore[no-untyped-call]

    def attach(self, stack: ExitStack) -> None:
        """Adds the hooks; the stack removes them."""
        for handle in (
            self.layer.router.register_forward_pre_hook(self.before),
            self.layer.router.register_forward_hook(self.after, always_call=True),
        ):
            stack.callback(handle.remove)


class LayerMask:
    """The mask of one layer, the same for all tokens.

    Args:
        layer: which one.
        allowed_E: on its device; at least one True.
        on_host: the same numbers on the host, where looking at them waits for no device.

    Attributes:
        num_routed: tokens that were routed so far.
        num_strays: choices of a disallowed expert by a router that had enough allowed ones.
        num_lost: tokens with disallowed choices that were left without any expert that has a weight.
    """

    def __init__(self, layer: MoELayer, allowed_E: Tensor, on_host: npt.NDArray[np.bool_]) -> None:
        self.layer, self.allowed_E = layer, allowed_E
        self.kept_logits = keep_shared_logits(layer, allowed_E)
        self.first_allowed, self.num_allowed = int(on_host.argmax()), int(on_host.sum())
        self.num_routed = self.num_lowered = 0
        # On the device, and read once at the end: a number read in every layer would make the host wait for the device.
        self.num_strays = torch.zeros((), dtype=torch.long, device=allowed_E.device)
        self.num_lost = torch.zeros_like(self.num_strays)

    def lower(self, logits: Tensor) -> Tensor:
        """The router's logits, those of disallowed experts lowered."""
        self.num_lowered += 1
        return torch.where(self.kept_logits, logits, lowered_logit(logits.dtype))

    def before_experts(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """What the experts module receives, without disallowed choices."""
        hidden, index_TK, weights_TK = routing_of_call(self.layer, args, kwargs)
        if not self.num_lowered:
            raise InputError(
                f"{self.layer.name}: its router computes no linear map to {self.layer.num_logits} logits that moe-ray can "
                "see, so it cannot be masked; this family is not supported"
            )
        self.num_routed += len(index_TK)
        index_TK, disallowed_TK = self.settle(index_TK)
        weights_TK = weights_TK.masked_fill(disallowed_TK, 0.0)
        # Of lowered logits, many families make weights of 0 themselves, so the router's own weights would not tell.
        self.num_lost += (disallowed_TK.any(dim=1) & (weights_TK == 0).all(dim=1)).sum()
        if self.num_allowed < index_TK.shape[1]:
            # At most `num_allowed` choices of a token are left; the rest, at weight 0, would be computed for nothing.
            # Stable: the allowed choices keep the router's order, and so does the sum over them.
            kept = disallowed_TK.long().argsort(dim=1, stable=True)[:, : self.num_allowed]
            index_TK, weights_TK = index_TK.gather(1, kept), weights_TK.gather(1, kept)
        rest = [*args, *kwargs.values()][3:]
        return (hidden, index_TK, weights_TK, *rest), {}

    def settle(self, index_TK: Tensor) -> tuple[Tensor, Tensor]:
        """(T, K) ids, an allowed expert's in place of a disallowed one's, and which those were.

        The id as well as the weight: an expert at weight 0 would still run, and be counted by whoever watches the ids.
        """
        disallowed_TK = ~self.allowed_E[index_TK]
        if self.num_allowed >= index_TK.shape[1]:
            self.note_strays(disallowed_TK)
        return index_TK.masked_fill(disallowed_TK, self.first_allowed), disallowed_TK

    def note_strays(self, disallowed: Tensor) -> None:
        """Counts disallowed choices of tokens with as many allowed experts as choices.

        In a group that holds too few, the router cannot do better.
        """
        if not self.layer.has_expert_groups():
            self.num_strays += disallowed.sum()

    def attach(self, stack: ExitStack) -> None:
        """Adds edit, hook and lowered biases; the stack undoes them."""
        EditedRouter(self.layer, self.lower).attach(stack)
        handle = self.layer.experts.register_forward_pre_hook(self.before_experts, with_kwargs=True)
        stack.callback(handle.remove)
        for bias in self.layer.selection_biases():
            self.lower_bias(bias, stack)

    def lower_bias(self, bias: Tensor, stack: ExitStack) -> None:
        """Keeps disallowed experts out of a choice by score plus bias, until the stack puts the bias back."""
        stack.enter_context(_lowered_in_place(bias, self.allowed_E))


def keep_shared_logits(layer: MoELayer, allowed: Tensor) -> Tensor:
    """(..., logits): which of the router's logits stay; those beyond the experts are of shared experts, not the mask's."""
    return F.pad(allowed, (0, layer.num_logits - layer.num_experts), value=True)


def lowered_logit(dtype: torch.dtype) -> float:
    """A disallowed expert's logit: in float16 -1e30 is -inf; a quarter of its least number leaves room to subtract."""
    return max(_LOWERED, torch.finfo(dtype).min / 4)


def lowered_bias(bias_E: Tensor, allowed: Tensor) -> Tensor:
    """A selection bias that keeps disallowed experts out: (E,) for one mask, (..., E) for several.

    A group of experts is chosen by the sum of its two best scores, each a sigmoid (0 to 1) plus bias. The lowered value
    ranks groups with two allowed experts before those with one before those with none; it is no lower than that needs, so
    that groups of one rank keep their order in float32.
    """
    least = bias_E.masked_fill(~allowed, torch.inf).amin(dim=-1, keepdim=True)
    most = bias_E.masked_fill(~allowed, -torch.inf).amax(dim=-1, keepdim=True)
    return torch.where(allowed, bias_E, 2 * least - most - 3)


@contextmanager
def _lowered_in_place(bias: Tensor, allowed_E: Tensor) -> Iterator[None]:
    """The bias lowered meanwhile, put back bit for bit afterwards."""
    original = bias.detach().clone()
    with torch.no_grad():
        bias.copy_(lowered_bias(original.flatten(), allowed_E).view_as(bias))
    try:
        yield
    finally:
        with torch.no_grad():
            bias.copy_(original)
