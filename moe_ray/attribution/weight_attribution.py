"""Weight attribution: how much of a prompt's answer hangs on each expert's weights, sum |w * dL/dw|.

A fused tensor's gradient is as large as the tensor, and that of every layer as large as the model. Here the family's own
forward takes its experts from a list (`expert_list`) whose every entry is the expert's slice behind an identity. The
identity's backward gets that one slice's gradient, adds up what is asked for, and hands nothing on; so no more than one
expert's gradient is there at a time, and no parameter gets one. Prompts run one at a time, since the absolute values are of
each prompt's own gradient, which no gradient of several prompts tells.

Shape suffixes: L MoE layers, E experts.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from moe_ray.attribution.frozen_parameters import no_parameter_learns
from moe_ray.models.expert_codes import QuantisedExperts
from moe_ray.models.expert_list import ExpertList
from moe_ray.models.loss import answer_loss
from moe_ray.models.moe_layers import MoELayer, find_moe_layers, uncompiled
from moe_ray.models.tokenization import TokenizedRow


def weight_attribution(model: PreTrainedModel, row: TokenizedRow, *, pad_id: int) -> npt.NDArray[np.float64]:
    """How much of one prompt's answer hangs on each expert's weights.

    With `L` the mean loss of the answer's tokens (nats per token) and `w` the weights of an expert,
    `sum |w * dL/dw|`: to first order what taking them away one by one would do to the loss, signs left aside. An expert
    that none of the prompt's tokens was routed to has 0.

    Source: the connection sensitivity |w * dL/dw| of SNIP (Lee et al. 2019), summed over an expert, as RASA (Liang et al.
    2026) ranks experts by gradients. Deviations: the loss is that of the model's own answer to the prompt, and the gradient
    is each prompt's own, so that prompts are the unit of what is said about it.

    Args:
        model: a causal language model in eval mode; its weights, gradients and flags are as before afterwards.
        row: a prompt with its answer.
        pad_id: token id of padding; none is used.

    Returns:
        (L, E) float64, in nats per token.

    Raises:
        InputError: the layers keep their experts in a form that has no slice per expert, quantised, or offloaded.
    """
    layers = find_moe_layers(model)
    precision = torch.promote_types(model.dtype, torch.float32)
    sums_LE = [
        torch.zeros(layer.num_experts, dtype=precision, device=next(layer.experts.parameters()).device)
        for layer in layers
    ]
    with ExitStack() as stack:
        anchor = torch.zeros((), requires_grad=True)
        stack.enter_context(uncompiled())
        stack.enter_context(no_parameter_learns(model))
        for layer, sums_E in zip(layers, sums_LE, strict=True):
            stack.enter_context(_tapped(layer, anchor, sums_E))
        stack.enter_context(torch.enable_grad())
        loss = answer_loss(model, [row], pad_id=pad_id)[0] / len(row.answer_ids)
        # The anchor is why the slices need a gradient at all; its own is None, and nothing else is written anywhere.
        torch.autograd.grad(loss, anchor, allow_unused=True)
    return np.stack([sums_E.cpu().double().numpy() for sums_E in sums_LE])


class _Tap(torch.autograd.Function):
    """A slice of an expert's weights as it is, whose gradient is looked at and dropped."""

    @staticmethod
    def forward(ctx: Any, anchor: Tensor, weights: Tensor, sums_E: Tensor, expert: int) -> Tensor:
        ctx.weights, ctx.sums_E, ctx.expert = weights, sums_E, expert
        return weights.view_as(weights)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[None, None, None, None]:
        precision = ctx.sums_E.dtype
        product = gradient.to(precision) * ctx.weights.to(precision)
        # On the device of the layer, so that nothing waits for it.
        ctx.sums_E[ctx.expert] += product.abs_().sum()
        return None, None, None, None


_tap: Any = _Tap.apply


class _Slices(Sequence[Tensor]):
    """The experts of a fused tensor, each behind its tap, made when it is first asked for."""

    def __init__(self, fused: Tensor | QuantisedExperts, anchor: Tensor, sums_E: Tensor) -> None:
        self._fused, self._anchor, self._sums_E = fused, anchor, sums_E
        # One tap for each, however often a forward takes the slice: the absolute value is of the whole gradient.
        self._tapped: dict[int, Tensor] = {}

    def __len__(self) -> int:
        return len(self._fused)

    def __getitem__(self, expert: Any) -> Any:
        if not 0 <= expert < len(self):
            raise IndexError(expert)  # ends an iteration over all
        if expert not in self._tapped:
            self._tapped[expert] = _tap(self._anchor, self._fused[expert].detach(), self._sums_E, expert)
        return self._tapped[expert]


@contextmanager
def _tapped(layer: MoELayer, anchor: Tensor, sums_E: Tensor) -> Iterator[None]:
    """The layer's experts behind taps, taken one by one."""
    layer.refuse_offloaded()
    shown: list[tuple[nn.Module, str, Any]] = []
    for expert, module in enumerate(layer.expert_modules()):
        for path, parameter in module.named_parameters():
            owner_path, _, name = path.rpartition(".")
            tap = _tap(anchor, parameter.detach(), sums_E, expert)
            shown.append((module.get_submodule(owner_path), name, tap))
    hidden: list[tuple[nn.Module, str, Any]] = []
    if not shown:
        for name, fused in layer.expert_stacks().items():
            shown.append((layer.experts, name, ExpertList(_Slices(fused, anchor, sums_E))))
            if name in layer.experts.__dict__:
                hidden.append((layer.experts, name, layer.experts.__dict__[name]))
    # An entry in the instance's dictionary hides the registered parameter of the same name.
    try:
        with _one_by_one(layer.experts):
            for owner, name, value in shown:
                owner.__dict__[name] = value
            yield
    finally:
        for owner, name, _ in shown:
            owner.__dict__.pop(name, None)
        # What stands in for codes is an entry of the same kind.
        for layer_experts, name, stand_in in hidden:
            layer_experts.__dict__[name] = stand_in


@contextmanager
def _one_by_one(experts: nn.Module) -> Iterator[None]:
    """The family's own loop over experts, whatever products its configuration asks for: those take all as one tensor."""
    config: Any = getattr(experts, "config", None)
    asked = getattr(config, "_experts_implementation", None)
    if asked is None or asked == "eager":
        yield
        return
    config._experts_implementation = "eager"
    try:
        yield
    finally:
        config._experts_implementation = asked
