"""Masked fine-tuning: the train step and the loop around it, in plain torch.

One optimiser step of N workers takes N whole batches, one per worker. Each worker routes through its own batch's mask; an
expert's gradient is averaged over the workers whose mask holds it; every worker makes the same update. A worker without
a batch takes part with nothing, so no step hangs.

Shape suffixes: L MoE layers, E experts.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from transformers import PreTrainedModel

from moe_ray.chat import TokenizedRow
from moe_ray.config import TrainConfig
from moe_ray.errors import InputError
from moe_ray.gradients import BatchGradient, accumulate_gradient, average_gradients, gradient_or_zeros, without_noise
from moe_ray.loss import answer_loss as answer_loss
from moe_ray.schedule import has_stopped_improving, learning_rate_factor, plan_steps
from moe_ray.selection import ExpertMasks, Mask, mask_to_experts
from moe_ray.trainable import TrainableExperts

TrainingBatches = Mapping[int, Sequence[TokenizedRow]]
"""Per `batch_idx`, the prompts with their target responses."""


@dataclass(frozen=True, kw_only=True)
class StepReport:
    """What one optimiser step did.

    Attributes:
        step: 0-based, over all epochs.
        epoch: 0-based.
        batch_idx: this worker's batch; -1 = it had none.
        num_experts: experts of that batch's mask.
        num_experts_routed: those of them that some token was routed to.
        num_tokens: target-response tokens of the batch.
        loss: mean loss over those tokens (nats per token), before the update.
        grad_norm: over all experts of the step, before clipping.
        learning_rate: of the step.
        seconds: of the step.
        validation_loss: after the epoch that this step ended; None = it ended none, or there is no validation.
    """

    step: int
    epoch: int
    batch_idx: int
    num_experts: int
    num_experts_routed: int
    num_tokens: int
    loss: float
    grad_norm: float
    learning_rate: float
    seconds: float
    validation_loss: float | None = None

    def as_dict(self) -> dict[str, Any]:
        """Plain values."""
        return asdict(self)


class MaskedTrainer:
    """Fine-tunes the union, each step under the mask of the batch it trains.

    Args:
        model: its experts are replaced by `trainable` while a batch trains.
        trainable: the union's experts.
        batches: target rows per `batch_idx`.
        masks: from selection; batches without an unsafe expert are not trained.
        config: hyperparameters.
        pad_id: token id that fills padding.
        seed: of the batch order.
        rank: of this worker.
        world_size: number of workers; above 1 `torch.distributed` must be initialised.
        batch_weights: per `batch_idx`, what its gradient is multiplied by; 1 where none is given.
        validate: gives the validation loss under natural routing; called on rank 0 after every epoch.

    Attributes:
        plan: the batches of every step.
        next_step: 0-based step that comes next.
        validation_losses: one per finished epoch, if there is `validate`.

    Raises:
        InputError: a batch has a mask but no rows or no answer tokens, or `config.patience` is on without `validate`.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        trainable: TrainableExperts,
        batches: TrainingBatches,
        masks: ExpertMasks,
        config: TrainConfig,
        *,
        pad_id: int,
        seed: int,
        rank: int = 0,
        world_size: int = 1,
        batch_weights: Mapping[int, float] | None = None,
        validate: Callable[[], float] | None = None,
    ) -> None:
        _check_batches(batches, masks)
        if config.patience and validate is None:
            raise InputError(
                "train.patience is on, but there is no validation loss; give validation prompts or set it to 0"
            )
        self.model, self.trainable, self.batches, self.masks, self.config = model, trainable, batches, masks, config
        self.pad_id, self.rank, self.world_size = pad_id, rank, world_size
        self.batch_weights, self.validate = batch_weights or {}, validate
        self.plan = plan_steps(masks.trained_batches, epochs=config.epochs, world_size=world_size, seed=seed)
        self.next_step = 0
        self.validation_losses: list[float] = []
        self.optimizer = torch.optim.AdamW(
            trainable.all_parameters(), lr=config.learning_rate, weight_decay=config.weight_decay
        )

    @property
    def steps_per_epoch(self) -> int:
        """Optimiser steps in one pass over all batches."""
        return len(self.plan) // self.config.epochs

    @property
    def is_finished(self) -> bool:
        """All steps are done, or the validation loss has stopped falling."""
        stopped = has_stopped_improving(self.validation_losses, self.config.patience)
        return stopped or self.next_step >= len(self.plan)

    def run(self, after_step: Callable[[StepReport], None] | None = None) -> list[StepReport]:
        """Trains from `next_step` to the end; calls `after_step` when each step's update is in force."""
        reports = []
        while not self.is_finished:
            with without_noise(self.model):
                report = self._step()
            if self.validate is not None and self.next_step % self.steps_per_epoch == 0:
                self.validation_losses.append(self._validation_loss(self.validate))
                report = replace(report, validation_loss=self.validation_losses[-1])
            reports.append(report)
            if after_step is not None:
                after_step(report)
        return reports

    def _step(self) -> StepReport:
        started = time.perf_counter()
        step, batch_ids = self.next_step, self.plan[self.next_step]
        learning_rate = self._set_learning_rate(step)
        own = batch_ids[self.rank]
        gradient = (
            self._own_gradient(own) if own >= 0 else BatchGradient(math.nan, 0, np.zeros_like(self.trainable.union_LE))
        )
        step_masks = [self.masks[batch_idx] for batch_idx in batch_ids if batch_idx >= 0]
        if self.world_size > 1:
            average_gradients(self.trainable, step_masks)
        grad_norm = self._update(np.any(step_masks, axis=0))
        self.next_step = step + 1
        return StepReport(
            step=step,
            epoch=step // self.steps_per_epoch,
            batch_idx=own,
            num_experts=len(self.masks.selected[own]) if own >= 0 else 0,
            num_experts_routed=int((gradient.routed_LE & self.masks[own]).sum()) if own >= 0 else 0,
            num_tokens=gradient.num_tokens,
            loss=gradient.loss,
            grad_norm=grad_norm,
            learning_rate=learning_rate,
            seconds=time.perf_counter() - started,
        )

    def _set_learning_rate(self, step: int) -> float:
        config = self.config
        factor = learning_rate_factor(step, len(self.plan), schedule=config.schedule, warmup=config.warmup)
        for group in self.optimizer.param_groups:
            group["lr"] = config.learning_rate * factor
        return config.learning_rate * factor

    def _own_gradient(self, batch_idx: int) -> BatchGradient:
        gradient = accumulate_gradient(
            self.model,
            self.trainable,
            self.batches[batch_idx],
            self.masks[batch_idx],
            config=self.config,
            pad_id=self.pad_id,
            weight=self.batch_weights.get(batch_idx, 1.0),
        )
        self._check_routing(batch_idx, gradient.routed_LE)
        return gradient

    def _check_routing(self, batch_idx: int, routed_LE: Mask) -> None:
        """What was really routed, against the list of the batch's own experts (not the mask that was put in force)."""
        layers = self.trainable.moe_layers.layers
        own = set(self.masks.selected[batch_idx])
        routed = mask_to_experts(routed_LE, layers)
        silent = {expert.layer for expert in own} - {expert.layer for expert in routed}
        if silent:
            raise RuntimeError(
                f"batch {batch_idx}: the experts of layers {sorted(silent)} were never called under its mask"
            )
        outside = [expert for expert in routed if expert not in own]
        if outside and self.config.routing == "masked":
            raise RuntimeError(
                f"batch {batch_idx}: tokens reached {outside[0]}, which is not one of its unsafe experts; the mask in force "
                "was not its own"
            )

    def _update(self, mask_LE: Mask) -> float:
        active = [
            p for expert in self.trainable.experts_of(mask_LE) for p in self.trainable.parameters[expert].values()
        ]
        for parameter in active:
            parameter.grad = gradient_or_zeros(parameter)
        limit = self.config.max_grad_norm or math.inf
        norm = torch.nn.utils.clip_grad_norm_(active, limit).item()
        # Gradients are the same on all workers by now, so they all stop here, and none waits for another.
        if not math.isfinite(norm):
            raise InputError(f"step {self.next_step}: the gradient's norm is {norm}; lower train.learning_rate")
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.trainable.write_back(mask_LE)
        return norm

    def _validation_loss(self, validate: Callable[[], float]) -> float:
        value = torch.tensor(validate() if self.rank == 0 else math.nan, dtype=torch.float64, device=self.model.device)
        if self.world_size > 1:
            dist.broadcast(value, src=0)
        return value.item()


def _check_batches(batches: TrainingBatches, masks: ExpertMasks) -> None:
    missing = sorted(set(masks.trained_batches) - set(batches))
    if missing:
        raise InputError(f"no training rows for batches {missing[:10]}; masks and batches must be of one run")
    silent = [batch for batch in masks.trained_batches if not any(row.answer_ids for row in batches[batch])]
    if silent:
        raise InputError(
            f"batches {silent[:10]} have no target-response tokens, so there is nothing to learn; give examples a target"
        )
