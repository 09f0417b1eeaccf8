"""What a training step did, batch by batch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
import torch.distributed as dist

from moe_ray.experts import ExpertMasks
from moe_ray.finetuning.gradients import BatchGradient


@dataclass(frozen=True, kw_only=True)
class BatchReport:
    """What one batch of a step contributed.

    Attributes:
        batch_idx: the batch.
        num_experts: experts of its mask.
        num_experts_routed: those of them that some token was routed to.
        num_tokens: target-response tokens.
        num_input_tokens: tokens of prompts and responses.
        loss: mean loss over its target-response tokens (nats per token), before the update.
    """

    batch_idx: int
    num_experts: int
    num_experts_routed: int
    num_tokens: int
    num_input_tokens: int
    loss: float


@dataclass(frozen=True, kw_only=True)
class StepReport:
    """What one optimiser step did, on all workers together; the same on every worker but for `seconds`.

    Attributes:
        step: 0-based, over all epochs.
        epoch: 0-based.
        batches: of all workers, in the plan's order.
        num_experts: experts that the step updated.
        num_tokens: target-response tokens of its batches.
        loss: mean loss over those tokens (nats per token), before the update.
        grad_norm: over all experts of the step, before clipping.
        learning_rate: of the step.
        seconds: of the step, on this worker.
        tokens_per_second: tokens of prompts and responses, of all workers.
        output_movement: in the first steps, per MoE layer what the outputs of trained experts have moved by since the
            training began or was resumed, as a share of their own norm; empty afterwards.
        warning: that they moved too far; said at one step of a training at most.
        validation_loss: after the epoch that this step ended; None = it ended none, or there is no validation.
    """

    step: int
    epoch: int
    batches: tuple[BatchReport, ...]
    num_experts: int
    num_tokens: int
    loss: float
    grad_norm: float
    learning_rate: float
    seconds: float
    tokens_per_second: float
    output_movement: tuple[float, ...] = ()
    warning: str = ""
    validation_loss: float | None = None

    @property
    def batch_idx(self) -> int:
        """The step's batch; -1 where it had several."""
        return self.batches[0].batch_idx if len(self.batches) == 1 else -1

    def as_dict(self) -> dict[str, Any]:
        """Plain values."""
        return {**asdict(self), "batch_idx": self.batch_idx}


def reports_of_all_workers(
    batch_ids: Sequence[int],
    gradients: Mapping[int, BatchGradient],
    masks: ExpertMasks,
    *,
    device: torch.device,
    world_size: int,
) -> tuple[BatchReport, ...]:
    """Reports of all batches of a step: every worker fills in its own rows of a table of numbers; their sum has all.

    Args:
        batch_ids: of the step; -1 stands where an epoch has no batch left.
        gradients: of this worker's batches, by their position in the step.
        masks: by `batch_idx`.
        device: that the workers add up on.
        world_size: number of workers.
    """
    numbers = torch.zeros(len(batch_ids), 4, dtype=torch.float64, device=device)
    for position, gradient in gradients.items():
        num_routed = (gradient.routed_LE & masks[batch_ids[position]]).sum()
        row = (gradient.loss, gradient.num_tokens, gradient.num_input_tokens, num_routed)
        numbers[position] = torch.tensor(row, dtype=torch.float64)
    if world_size > 1:
        dist.all_reduce(numbers)
    return tuple(
        BatchReport(
            batch_idx=batch_idx,
            num_experts=len(masks.selected[batch_idx]),
            num_experts_routed=int(num_routed),
            num_tokens=int(num_tokens),
            num_input_tokens=int(num_input_tokens),
            loss=loss,
        )
        for batch_idx, (loss, num_tokens, num_input_tokens, num_routed) in zip(batch_ids, numbers.tolist(), strict=True)
        if batch_idx >= 0
    )
