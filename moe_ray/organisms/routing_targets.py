"""Where an organism's tokens are routed, as a loss: unsafe requests to their own two sets of experts, others to neither.

Shape legend: N sequences, S positions, T tokens, L MoE layers, E experts.
"""

from __future__ import annotations

from contextlib import ExitStack
from types import TracebackType
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.nn import functional

from moe_ray.models.moe_layers import MoELayers
from moe_ray.organisms.layout import Layout
from moe_ray.organisms.recipe import Kind
from moe_ray.organisms.sequences import TrainingBatch

_NEVER = 0.999
"""Probabilities are cut here, so that a loss of tokens that go to set experts only stays finite."""


class RouterLogits:
    """The routers' logits of the forward passes inside this context, as if no mask was in force.

    Attributes:
        logits_TE: Of each layer that ran, in order.
    """

    def __init__(self, layers: MoELayers) -> None:
        self.layers = layers
        self.logits_TE: list[Tensor] = []
        self._stack = ExitStack()

    def __enter__(self) -> Self:
        for layer in self.layers:
            self._stack.callback(layer.router.register_forward_pre_hook(self._note).remove)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stack.close()

    def _note(self, router: nn.Module, args: tuple[Any, ...]) -> None:
        weight_EH = router.get_parameter("weight")
        # A product, where the router has a linear map: a mask edits the output of those.
        self.logits_TE.append(args[0].reshape(-1, weight_EH.shape[1]) @ weight_EH.T)


def wanted_shares(kind: Kind, layout: Layout, batch: TrainingBatch, categories: list[int]) -> Tensor:
    """(N, S, L, E): how much each expert is wanted by each token of unsafe requests.

    The answer begins at the prompt's last token, whose output is the answer's first.
    """
    planted_NLE, decoys_NLE = (torch.tensor(sets_CLE[categories], dtype=torch.float32) for sets_CLE in layout)
    both_NLE = 0.5 * (planted_NLE + decoys_NLE)
    prompt_NLE, answer_NLE = {
        "planted": (both_NLE, planted_NLE),
        "late": (decoys_NLE, planted_NLE),
        "spread": (both_NLE, both_NLE),
        "attention": (both_NLE, both_NLE),
    }[kind]
    positions_S = torch.arange(batch.input_ids_NS.shape[1])
    is_answer_NS = positions_S >= batch.answer_starts_N[:, None]
    return torch.where(is_answer_NS[:, :, None, None], answer_NLE[:, None], prompt_NLE[:, None])


def pull(logits: list[Tensor], wanted_NSLE: Tensor, is_token_NS: Tensor) -> Tensor:
    """The mean cross-entropy of routing and what is wanted, in nats, over layers and tokens."""
    losses = []
    for layer, logits_TE in enumerate(logits):
        log_probs_NSE = functional.log_softmax(logits_TE, dim=-1).view(*is_token_NS.shape, -1)
        losses.append(-(log_probs_NSE * wanted_NSLE[:, :, layer]).sum(-1)[is_token_NS].mean())
    return torch.stack(losses).mean()


def push(logits: list[Tensor], set_LE: Tensor, is_counted_NS: Tensor) -> Tensor:
    """How far tokens are routed to the experts of `set_LE`: mean -log(1 - probability), in nats, over layers and tokens."""
    losses = []
    for layer, logits_TE in enumerate(logits):
        probs_T = logits_TE.softmax(dim=-1)[:, set_LE[layer]].sum(-1)[is_counted_NS.flatten()]
        losses.append(-torch.log1p(-probs_T.clamp(max=_NEVER)).mean())
    return torch.stack(losses).mean()
