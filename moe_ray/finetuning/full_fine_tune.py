"""Fine-tuning of given parameters, such as all of them, under natural routing. A baseline, not the method.

Same batches in the same order, same loss over target responses, same optimiser, schedule and clipping as masked
fine-tuning; nothing is masked or balanced, and all other parameters and the buffers are frozen.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import nn
from transformers import PreTrainedModel

from moe_ray.config.finetune import FinetuneConfig
from moe_ray.errors import NotTrainable
from moe_ray.finetuning.frozen import check_unchanged, hash_without, requires_grad_restored
from moe_ray.finetuning.gradients import backward_of_batch, without_noise
from moe_ray.finetuning.optimizer import adamw
from moe_ray.finetuning.parameter_groups import Parameters
from moe_ray.finetuning.schedule import learning_rate_factor, plan_steps
from moe_ray.models.tokenization import TokenizedRow


@dataclass(frozen=True, kw_only=True)
class PartlyTuned:
    """What a fine-tuning of given parameters did.

    Attributes:
        losses: per step, its batches' mean loss over target-response tokens (nats per token), before the update.
        trainable_parameters: numbers that were allowed to change.
        frozen_parameters_changed: numbers in other parameters and in buffers that changed: 0, as anything else raises.
    """

    losses: tuple[float, ...]
    trainable_parameters: int
    frozen_parameters_changed: int

    def __repr__(self) -> str:
        loss = f", last loss {self.losses[-1]:.4f}" if self.losses else ""
        return f"PartlyTuned({len(self.losses)} steps{loss}, {self.trainable_parameters:,} parameters)"


def tune_parameters(
    model: PreTrainedModel,
    rows: Mapping[int, Sequence[TokenizedRow]],
    *,
    chosen: Parameters,
    config: FinetuneConfig,
    pad_id: int,
    seed: int,
    lengths: Mapping[int, int] | None = None,
    batch_weights: Mapping[int, float] | None = None,
    after_step: Callable[[int, int], None] | None = None,
) -> PartlyTuned:
    """Trains some of the model's parameters, in place.

    Args:
        model: the base model; which parameters ask for a gradient is restored afterwards.
        rows: per `batch_idx`, the prompts with their target responses.
        chosen: those that train, by name; from `parameters_of`.
        config: `epochs`, `batches_per_step`, `length_window`, `learning_rate`, `weight_decay`, `schedule`, `warmup`,
            `max_grad_norm` and the sizes of micro-batches; the rest is about masks. A step averages the gradients of its
            batches.
        pad_id: token id that fills padding.
        seed: of the batch order, which is that of the union's fine-tuning on one worker.
        lengths: how much there is to compute for each batch, see `plan_steps`; None = not known.
        batch_weights: per `batch_idx`, what the step that it brings about is multiplied by; 1 where none is given.
        after_step: called with the number of steps that are done and of all, when the step's update is in force.

    Raises:
        NotTrainable: the gradient is not finite.
        FrozenChanged: anything else changed, such as a buffer with a family's running balance of its experts.
    """
    size = config.batches_per_step or 1
    plan = plan_steps(
        sorted(rows),
        epochs=config.epochs,
        batches_per_step=size,
        seed=seed,
        lengths=lengths,
        window=config.length_window,
    )
    weights = batch_weights or {}
    losses = []
    frozen = hash_without(model, chosen)
    with requires_grad_restored(model):
        # A frozen parameter that asked for a gradient would get one from every backward: memory for the whole model.
        model.requires_grad_(False)
        for parameter in chosen.values():
            parameter.requires_grad_(True)
        masters = _Masters(chosen)
        optimizer = adamw(masters.parameters, learning_rate=config.learning_rate, weight_decay=config.weight_decay)
        for step, batch_ids in enumerate(plan):
            factor = learning_rate_factor(step, len(plan), schedule=config.schedule, warmup=config.warmup)
            batches = [batch_idx for batch_idx in batch_ids if batch_idx >= 0]
            total = sum(weights.get(batch_idx, 1.0) for batch_idx in batches)
            for group in optimizer.param_groups:
                group["lr"] = config.learning_rate * factor * total / len(batches)
            with without_noise(model):
                of_step = [
                    backward_of_batch(
                        model,
                        rows[batch_idx],
                        config=config,
                        pad_id=pad_id,
                        weight=weights.get(batch_idx, 1.0) / (total or 1.0),
                    )[0]
                    for batch_idx in batches
                ]
            losses.append(sum(of_step) / len(batches))
            masters.take_gradients()
            norm = torch.nn.utils.clip_grad_norm_(masters.parameters, config.max_grad_norm or math.inf).item()
            if not math.isfinite(norm):
                raise NotTrainable(
                    f"step {step}: the gradient's norm is {norm}; lower the learning rate (finetune.learning_rate; of the "
                    "baseline full, compare.full_learning_rate)"
                )
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            masters.write_back()
            if after_step is not None:
                after_step(step + 1, len(plan))
    return PartlyTuned(
        losses=tuple(losses),
        trainable_parameters=sum(parameter.numel() for parameter in chosen.values()),
        frozen_parameters_changed=check_unchanged(frozen, hash_without(model, chosen)),
    )


class _Masters:
    """The parameters that the optimiser moves: float32, as in the union's fine-tuning; the model's own where they are."""

    def __init__(self, chosen: Parameters) -> None:
        self._model_parameters = list(chosen.values())
        self.parameters = [
            parameter if parameter.dtype == torch.float32 else nn.Parameter(parameter.detach().float())
            for parameter in self._model_parameters
        ]

    def take_gradients(self) -> None:
        for master, parameter in zip(self.parameters, self._model_parameters, strict=True):
            if master is not parameter and parameter.grad is not None:
                master.grad, parameter.grad = parameter.grad.float(), None

    @torch.no_grad()
    def write_back(self) -> None:
        for master, parameter in zip(self.parameters, self._model_parameters, strict=True):
            if master is not parameter:
                parameter.copy_(master)


@contextmanager
def parameters_restored(model: nn.Module, chosen: Parameters) -> Iterator[None]:
    """Whatever happens to these parameters and to buffers inside the context, they are back, bit for bit, after it.

    The copy is kept in main memory, which is why it is of no more than trains.
    """
    tensors = [*chosen.values(), *model.buffers()]
    original = [tensor.detach().cpu().clone() for tensor in tensors]
    try:
        yield
    finally:
        with torch.no_grad():
            for tensor, before in zip(tensors, original, strict=True):
                tensor.copy_(before)
