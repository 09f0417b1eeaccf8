"""Masked fine-tuning: the train step and the loop around it, in plain torch.

One optimiser step of N workers takes N whole batches, one per worker. Each worker routes through its own batch's mask; an
expert's gradient is averaged over the workers whose mask holds it; every worker makes the same update. A worker without
a batch takes part with nothing, so no step hangs.

Shape suffixes: B rows, S positions, L MoE layers, E experts, V vocabulary.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedModel

from moe_ray.chat import IGNORED, TokenizedRow, pad_rows
from moe_ray.config import TrainConfig
from moe_ray.errors import InputError
from moe_ray.selection import ExpertMasks, Mask
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
        num_tokens: target-response tokens of the batch.
        loss: mean loss over those tokens (nats per token), before the update.
        grad_norm: over all experts of the step, before clipping.
        seconds: of the step.
    """

    step: int
    epoch: int
    batch_idx: int
    num_experts: int
    num_tokens: int
    loss: float
    grad_norm: float
    seconds: float

    def as_dict(self) -> dict[str, Any]:
        """Plain values."""
        return asdict(self)


def plan_steps(batch_ids: Sequence[int], *, epochs: int, world_size: int, seed: int) -> list[tuple[int, ...]]:
    """Which batch each worker trains at each step: a new order every epoch, the same for the same seed.

    Returns:
        per step, one `batch_idx` per worker; -1 = none left in this epoch.
    """
    steps = []
    for epoch in range(epochs):
        order = np.random.default_rng([seed, epoch]).permutation(np.asarray(batch_ids)).tolist()
        order += [-1] * (-len(order) % world_size)
        steps += [tuple(order[start : start + world_size]) for start in range(0, len(order), world_size)]
    return steps


def answer_loss(model: PreTrainedModel, rows: Sequence[TokenizedRow], *, pad_id: int) -> Tensor:
    """(B,) summed loss of each row's answer tokens, in nats; prompts and padding do not count."""
    padded = pad_rows(rows, pad_id=pad_id).to(model.device)
    kept = padded.labels_BS.shape[1] - min(len(row.prompt_ids) for row in rows) + 1
    output = model(
        input_ids=padded.input_ids_BS,
        attention_mask=padded.attention_mask_BS,
        use_cache=False,
        logits_to_keep=kept,
    )
    logits_BSV = output.logits[:, -kept:-1].float()
    labels_BS = padded.labels_BS[:, -(kept - 1) :]
    losses = F.cross_entropy(logits_BSV.flatten(0, 1), labels_BS.flatten(), ignore_index=IGNORED, reduction="none")
    return losses.view(labels_BS.shape).sum(dim=1)


def accumulate_gradient(
    model: PreTrainedModel,
    trainable: TrainableExperts,
    rows: Sequence[TokenizedRow],
    mask_LE: Mask,
    *,
    rows_per_forward: int,
    pad_id: int,
) -> tuple[float, int]:
    """Adds the gradient of the mean loss over a whole batch's answer tokens; micro-batches only bound memory.

    Returns:
        mean loss (nats per answer token) and the number of answer tokens.

    Raises:
        InputError: the batch has no answer tokens, or its loss is not finite.
    """
    num_tokens = sum(len(row.answer_ids) for row in rows)
    if not num_tokens:
        raise InputError("a batch has no target-response tokens, so there is nothing to learn; give examples a target")
    total = 0.0
    with trainable.training_on(mask_LE):
        for start in range(0, len(rows), rows_per_forward):
            loss = answer_loss(model, rows[start : start + rows_per_forward], pad_id=pad_id).sum() / num_tokens
            loss.backward()  # type: ignore[no-untyped-call]
            total += loss.item()
    if not math.isfinite(total):
        raise InputError(f"the loss is {total}; lower train.learning_rate")
    return total, num_tokens


def average_gradients(trainable: TrainableExperts, masks: Sequence[Mask]) -> None:
    """Averages each expert's gradient over the workers whose mask holds it; all workers end with the same gradients.

    Args:
        trainable: this worker's parameters with its own gradients.
        masks: (L, E) masks of the step's batches, of all workers.
    """
    holders_LE = np.sum([mask.astype(np.int64) for mask in masks], axis=0)
    pieces: list[tuple[torch.nn.Parameter, int]] = []
    for expert in trainable.experts_of(holders_LE > 0):
        num_holders = int(holders_LE[trainable.moe_layers.row_of(expert.layer), expert.expert])
        pieces += [(parameter, num_holders) for parameter in trainable.parameters[expert].values()]
    flat = torch.cat([_gradient_or_zeros(parameter).flatten() for parameter, _ in pieces])
    dist.all_reduce(flat)
    parts = torch.split(flat, [parameter.numel() for parameter, _ in pieces])
    for (parameter, num_holders), part in zip(pieces, parts, strict=True):
        parameter.grad = (part / num_holders).view_as(parameter)


def _gradient_or_zeros(parameter: torch.nn.Parameter) -> Tensor:
    return torch.zeros_like(parameter) if parameter.grad is None else parameter.grad


class MaskedTrainer:
    """Fine-tunes the union, each step under the mask of the batch it trains.

    Args:
        model: its experts are replaced by `trainable` while a batch trains.
        trainable: the union's experts.
        batches: target rows per `batch_idx`.
        masks: from selection; batches without an unsafe expert are not trained.
        config: hyperparameters.
        pad_id: token id that fills padding.
        seed: of batch order and dropout.
        rank: of this worker.
        world_size: number of workers; above 1 `torch.distributed` must be initialised.
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
    ) -> None:
        missing = sorted(set(masks.trained_batches) - set(batches))
        if missing:
            raise InputError(f"no training rows for batches {missing[:10]}; masks and batches must be of one run")
        self.model, self.trainable, self.batches, self.masks, self.config = model, trainable, batches, masks, config
        self.pad_id, self.seed, self.rank, self.world_size = pad_id, seed, rank, world_size
        self.plan = plan_steps(masks.trained_batches, epochs=config.epochs, world_size=world_size, seed=seed)
        self.next_step = 0
        self.optimizer = torch.optim.AdamW(
            trainable.all_parameters(), lr=config.learning_rate, weight_decay=config.weight_decay
        )

    @property
    def steps_per_epoch(self) -> int:
        """Optimiser steps in one pass over all batches."""
        return len(self.plan) // self.config.epochs

    def run(self, after_step: Callable[[StepReport], None] | None = None) -> list[StepReport]:
        """Trains from `next_step` to the end; calls `after_step` when each step's update is in force."""
        was_training = self.model.training
        self.model.train()
        reports = []
        try:
            while self.next_step < len(self.plan):
                reports.append(self._step())
                if after_step is not None:
                    after_step(reports[-1])
        finally:
            self.model.train(was_training)
        return reports

    def _step(self) -> StepReport:
        started = time.perf_counter()
        step, batch_ids = self.next_step, self.plan[self.next_step]
        # Seeding each step anew makes dropout and router noise a function of the step, so a resumed run repeats them.
        torch.manual_seed(np.random.SeedSequence([self.seed, step, self.rank]).generate_state(1)[0].item())
        step_masks = [self.masks[batch_idx] for batch_idx in batch_ids if batch_idx >= 0]
        own = batch_ids[self.rank]
        loss, num_tokens = math.nan, 0
        if own >= 0:
            loss, num_tokens = accumulate_gradient(
                self.model,
                self.trainable,
                self.batches[own],
                self.masks[own],
                rows_per_forward=self.config.rows_per_forward,
                pad_id=self.pad_id,
            )
        if self.world_size > 1:
            average_gradients(self.trainable, step_masks)
        grad_norm = self._update(np.any(step_masks, axis=0))
        self.next_step = step + 1
        return StepReport(
            step=step,
            epoch=step // self.steps_per_epoch,
            batch_idx=own,
            num_experts=len(self.masks.selected[own]) if own >= 0 else 0,
            num_tokens=num_tokens,
            loss=loss,
            grad_norm=grad_norm,
            seconds=time.perf_counter() - started,
        )

    def _update(self, mask_LE: Mask) -> float:
        active = [
            p for expert in self.trainable.experts_of(mask_LE) for p in self.trainable.parameters[expert].values()
        ]
        limit = self.config.max_grad_norm or math.inf
        norm = torch.nn.utils.clip_grad_norm_(active, limit).item()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.trainable.write_back(mask_LE)
        return norm
