"""Fine-tuning of the union: the train step and the loop around it, in plain torch.

One optimiser step takes some whole batches, shared out among the workers. Each batch moves its own experts only; an
expert's gradient is averaged over the batches whose mask holds it; every worker makes the same update. How many workers
share a step's batches therefore changes the time it takes, not the result. A worker without a batch takes part with
nothing, so no step hangs.

Shape suffixes: L MoE layers, E experts.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import replace

import numpy as np
import torch
import torch.distributed as dist
from transformers import PreTrainedModel

from moe_ray.config.finetune import FinetuneConfig
from moe_ray.errors import InputError
from moe_ray.experts import ExpertMasks
from moe_ray.finetuning.expert_owners import ExpertOwners
from moe_ray.finetuning.gradients import (
    BatchGradient,
    accumulate_gradient,
    average_gradients,
    without_noise,
)
from moe_ray.finetuning.mask_check import Monitor, Observation, check_routing, restricting_layers
from moe_ray.finetuning.optimizer import adamw
from moe_ray.finetuning.optimizer_step import update_experts
from moe_ray.finetuning.output_movement import Movement, OutputMovement, watched_steps
from moe_ray.finetuning.router_training import RouterTraining
from moe_ray.finetuning.routing_policy import RoutingPolicy
from moe_ray.finetuning.schedule import has_stopped_improving, learning_rate_factor, plan_steps, share_out
from moe_ray.finetuning.sharded_passes import empty_pass, passes_to_add
from moe_ray.finetuning.step_report import StepReport, reports_of_all_workers
from moe_ray.finetuning.trainable_experts import TrainableExperts
from moe_ray.models.sharded_storage import is_sharded
from moe_ray.models.tokenization import TokenizedRow
from moe_ray.models.unmaskable import refuse_unmaskable

TrainingBatches = Mapping[int, Sequence[TokenizedRow]]
"""Per `batch_idx`, the prompts with their target responses."""


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
        batch_weights: per `batch_idx`, what the step that it brings about is multiplied by; 1 where none is given. In a
            step of several batches, gradients count by weight, and an expert's step by the mean weight of its batches.
            (A factor on the gradient alone would do nothing: AdamW divides it out.)
        lengths: how much there is to compute for each batch, see `plan_steps`; None = not known.
        before_epoch: called with the batches that this worker still trains in an epoch, before it takes their rows.
        validate: gives the validation loss under natural routing; called after every epoch, on rank 0, or on all workers
            where the model is sharded.
        monitor: called for every batch before the step's update; None = nothing is checked.

    Attributes:
        plan: the batches of every step.
        owners: which worker keeps the optimiser state of each expert.
        routers: their training; None = they are frozen.
        next_step: 0-based step that comes next.
        validation_losses: one per finished epoch, if there is `validate`.

    Raises:
        InputError: a batch has a mask but no rows, `config.patience` is on without `validate`, a step has fewer batches
            than there are workers, or tokens are to be masked in a family that cannot be.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        trainable: TrainableExperts,
        batches: TrainingBatches,
        masks: ExpertMasks,
        config: FinetuneConfig,
        *,
        pad_id: int,
        seed: int,
        rank: int = 0,
        world_size: int = 1,
        batch_weights: Mapping[int, float] | None = None,
        lengths: Mapping[int, int] | None = None,
        before_epoch: Callable[[Collection[int]], None] | None = None,
        validate: Callable[[], float] | None = None,
        monitor: Monitor | None = check_routing,
    ) -> None:
        if missing := sorted(set(masks.trained_batches) - set(batches)):
            raise InputError(f"no training rows for batches {missing[:10]}; masks and batches must be of one run")
        if config.patience and validate is None:
            raise InputError(
                "finetune.patience is on, but there is no validation loss; give validation prompts or set it to 0"
            )
        self.model, self.trainable, self.batches, self.masks, self.config = model, trainable, batches, masks, config
        self.pad_id, self.rank, self.world_size = pad_id, rank, world_size
        self.batch_weights, self.lengths = batch_weights or {}, lengths
        self.before_epoch, self.validate, self.monitor = before_epoch, validate, monitor
        if config.routing.startswith("masked"):
            # Of all batches, before the first: its mask may have no expert in the layers that cannot be masked.
            layers = zip(trainable.moe_layers, masks.union, strict=True)
            refuse_unmaskable(layer for layer, union_E in layers if union_E.any())
        batches_per_step = config.batches_per_step or world_size
        if batches_per_step < world_size:
            raise InputError(
                f"finetune.batches_per_step: got {batches_per_step} for {world_size} workers, expected at least one batch "
                "for each; raise it or lower finetune.num_workers"
            )
        self.plan = plan_steps(
            masks.trained_batches,
            epochs=config.epochs,
            batches_per_step=batches_per_step,
            seed=seed,
            lengths=lengths,
            window=config.length_window,
        )
        self._is_sharded = world_size > 1 and is_sharded(model)
        self.next_step = 0
        self._is_stopped = False
        self._epoch_prepared = -1
        self.validation_losses: list[float] = []
        self.owners = ExpertOwners(trainable, rank=rank, world_size=world_size)
        # Over all of them, but what has no gradient gets no state: this worker's has that of its own experts.
        self.optimizer = adamw(
            trainable.all_parameters(), learning_rate=config.learning_rate, weight_decay=config.weight_decay
        )
        self._movement = OutputMovement(trainable, world_size=world_size)
        self._watched_steps = watched_steps(len(self.plan), schedule=config.schedule, warmup=config.warmup)
        self.routers: RouterTraining | None = None
        if config.router == "alternating":
            if self._is_sharded:
                raise InputError("finetune.router: got alternating for a sharded model, expected frozen")
            self.routers = RouterTraining(model, trainable, config, pad_id=pad_id, world_size=world_size)

    @property
    def steps_per_epoch(self) -> int:
        """Optimiser steps in one pass over all batches."""
        return len(self.plan) // self.config.epochs

    @property
    def is_finished(self) -> bool:
        """All steps are done, the validation loss has stopped falling, or `stop` was called."""
        stopped = self._is_stopped or has_stopped_improving(self.validation_losses, self.config.patience)
        return stopped or self.next_step >= len(self.plan)

    def stop(self) -> None:
        """Ends the training after the step that is under way; with several workers each has to call it."""
        self._is_stopped = True

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
        self._prepare_epoch(step)
        learning_rate = self._set_learning_rate(step)
        own_positions = self._own_positions(batch_ids)
        passes = 0
        if self._is_sharded:
            # Before the first pass: afterwards a worker that is done would meet others in another collective.
            own_rows = [self.batches[batch_ids[position]] for position in own_positions]
            passes = passes_to_add(own_rows, config=self.config, device=self.model.device)
        gradients = {position: self._gradient_of(batch_ids[position]) for position in own_positions}
        for _ in range(passes):
            empty_pass(self.model, pad_id=self.pad_id)
        step_masks = [self.masks[batch_idx] for batch_idx in batch_ids if batch_idx >= 0]
        weights = [self.batch_weights.get(batch_idx, 1.0) for batch_idx in batch_ids if batch_idx >= 0]
        average_gradients(self.owners, step_masks, weights=weights)
        batches = reports_of_all_workers(
            batch_ids, gradients, self.masks, device=self.model.device, world_size=self.world_size
        )
        grad_norm = update_experts(
            self.owners, self.optimizer, step_masks, weights, max_grad_norm=self.config.max_grad_norm, step=step
        )
        moved = Movement()
        if step < self._watched_steps:
            moved = self._movement.after_step(what=f"step {step}, learning rate {learning_rate:.3g}")
        if self.routers is not None and self.routers.is_due(step):
            own = [batch_ids[position] for position in gradients]
            self.routers.step(
                [(self.batches[batch_idx], self.batch_weights.get(batch_idx, 1.0)) for batch_idx in own],
                total_weight=sum(weights),
                rate=learning_rate / self.config.learning_rate,
            )
        self.next_step = step + 1
        num_tokens, seconds = sum(batch.num_tokens for batch in batches), time.perf_counter() - started
        return StepReport(
            step=step,
            epoch=step // self.steps_per_epoch,
            batches=batches,
            num_experts=int(np.any(step_masks, axis=0).sum()),
            num_tokens=num_tokens,
            loss=sum(batch.loss * batch.num_tokens for batch in batches) / num_tokens,
            grad_norm=grad_norm,
            learning_rate=learning_rate,
            seconds=seconds,
            tokens_per_second=sum(batch.num_input_tokens for batch in batches) / seconds,
            output_movement=moved.of_layers,
            warning=moved.warning,
        )

    def _own_positions(self, batch_ids: Sequence[int]) -> list[int]:
        """Where in a step this worker's batches stand; -1 stands where an epoch has no batch left."""
        workers = share_out(batch_ids, num_workers=self.world_size, lengths=self.lengths)
        return [n for n, worker in enumerate(workers) if worker == self.rank and batch_ids[n] >= 0]

    def _prepare_epoch(self, step: int) -> None:
        """Says which batches this worker will train, when the first step of an epoch, or of a resumed run, begins."""
        epoch = step // self.steps_per_epoch
        if self.before_epoch is not None and epoch != self._epoch_prepared:
            steps = self.plan[step : (epoch + 1) * self.steps_per_epoch]
            self.before_epoch([batch_ids[n] for batch_ids in steps for n in self._own_positions(batch_ids)])
        self._epoch_prepared = epoch

    def _set_learning_rate(self, step: int) -> float:
        config = self.config
        factor = learning_rate_factor(step, len(self.plan), schedule=config.schedule, warmup=config.warmup)
        for group in self.optimizer.param_groups:
            group["lr"] = config.learning_rate * factor
        return config.learning_rate * factor

    def _gradient_of(self, batch_idx: int) -> BatchGradient:
        mask_LE, rows = self.masks[batch_idx], self.batches[batch_idx]
        policy = RoutingPolicy.at_step(self.config, self.next_step, len(self.plan))
        if not any(row.answer_ids for row in rows):
            raise InputError(
                f"batch {batch_idx} has no target-response tokens, so there is nothing to learn; give examples a target"
            )
        gradient = accumulate_gradient(
            self.model,
            self.trainable,
            rows,
            mask_LE,
            config=self.config,
            pad_id=self.pad_id,
            policy=policy,
            weight=self.batch_weights.get(batch_idx, 1.0),
            movement=self._movement if self.next_step < self._watched_steps else None,
        )
        if self.monitor is not None:
            self.monitor(
                Observation(
                    batch_idx=batch_idx,
                    listed=frozenset(self.masks.selected[batch_idx]),
                    mask_LE=mask_LE,
                    routed_LE=gradient.routed_LE,
                    restricted_LE=gradient.restricted_LE,
                    layers=self.trainable.moe_layers.layers,
                    restricting=restricting_layers(
                        self.masks.selected[batch_idx],
                        self.config,
                        num_experts_per_tok=self.trainable.moe_layers.num_experts_per_tok,
                    ),
                )
            )
        return gradient

    def _validation_loss(self, validate: Callable[[], float]) -> float:
        # A pass of a sharded model needs all of its workers.
        loss = validate() if self.rank == 0 or self._is_sharded else math.nan
        value = torch.tensor(loss, dtype=torch.float64, device=self.model.device)
        if self.world_size > 1:
            dist.broadcast(value, src=0)
        return value.item()
