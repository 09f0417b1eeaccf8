"""What a training step did, batch by batch."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any


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
    validation_loss: float | None = None

    @property
    def batch_idx(self) -> int:
        """The step's batch; -1 where it had several."""
        return self.batches[0].batch_idx if len(self.batches) == 1 else -1

    def as_dict(self) -> dict[str, Any]:
        """Plain values."""
        return {**asdict(self), "batch_idx": self.batch_idx}
