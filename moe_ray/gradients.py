"""The gradient of one whole batch, and its average over workers.

Shape suffixes: L MoE layers, E experts.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from moe_ray.chat import TokenizedRow
from moe_ray.config import TrainConfig
from moe_ray.loss import answer_loss, micro_batches
from moe_ray.selection import Mask
from moe_ray.trainable import TrainableExperts


class BatchGradient(NamedTuple):
    """What `accumulate_gradient` saw: mean loss (nats per answer token), answer tokens, (L, E) experts with a token."""

    loss: float
    num_tokens: int
    routed_LE: Mask


def accumulate_gradient(
    model: PreTrainedModel,
    trainable: TrainableExperts,
    rows: Sequence[TokenizedRow],
    mask_LE: Mask,
    *,
    config: TrainConfig,
    pad_id: int,
    weight: float = 1.0,
) -> BatchGradient:
    """Adds the gradient of the mean loss over a whole batch's answer tokens; micro-batches only bound memory.

    Args:
        model: it routes as `config.routing` says.
        trainable: its experts get the gradient.
        rows: the whole batch, with at least one answer token.
        mask_LE: (L, E) the batch's experts.
        config: routing and size of micro-batches.
        pad_id: token id that fills padding.
        weight: the gradient, not the loss that is returned, is multiplied by this.
    """
    num_tokens = sum(len(row.answer_ids) for row in rows)
    total = 0.0
    with trainable.training_on(mask_LE, routing=config.routing, boost=config.boost) as monitor:
        for group in micro_batches(
            rows, rows_per_forward=config.rows_per_forward, tokens_per_forward=config.tokens_per_forward
        ):
            loss = answer_loss(model, group, pad_id=pad_id).sum() / num_tokens
            (loss * weight).backward()  # type: ignore[no-untyped-call]
            total += loss.item()
        routed_LE = monitor.routed()
    return BatchGradient(total, num_tokens, routed_LE)


@contextmanager
def without_noise(model: nn.Module) -> Iterator[None]:
    """Dropout, router jitter and sampled routing are off; activation checkpointing, if enabled, stays on.

    Training so makes a step a function of its batch alone: the same however it is cut into micro-batches, on a resumed
    run, and under the routing that the batch was analysed with. The library checkpoints activations only in layers that
    are in training mode, so those layers alone are put into it.
    """
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    for module in model.modules():
        if isinstance(module, GradientCheckpointingLayer) and module.gradient_checkpointing:
            module.training = True
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


def average_gradients(trainable: TrainableExperts, masks: Sequence[Mask]) -> None:
    """Averages each expert's gradient over the workers whose mask holds it; all workers end with the same gradients.

    Args:
        trainable: this worker's parameters with its own gradients.
        masks: (L, E) masks of the step's batches, of all workers.
    """
    holders_LE = np.sum([mask.astype(np.int64) for mask in masks], axis=0)
    pieces: list[tuple[nn.Parameter, int]] = []
    for expert in trainable.experts_of(holders_LE > 0):
        num_holders = int(holders_LE[trainable.moe_layers.row_of(expert.layer), expert.expert])
        pieces += [(parameter, num_holders) for parameter in trainable.parameters[expert].values()]
    flat = torch.cat([gradient_or_zeros(parameter).flatten() for parameter, _ in pieces])
    dist.all_reduce(flat)
    parts = torch.split(flat, [parameter.numel() for parameter, _ in pieces])
    for (parameter, num_holders), part in zip(pieces, parts, strict=True):
        parameter.grad = (part / num_holders).view_as(parameter)


def gradient_or_zeros(parameter: nn.Parameter) -> Tensor:
    """The parameter's gradient; zeros where it got none."""
    return torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
