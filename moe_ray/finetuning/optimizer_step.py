"""The update of a step: owners clip the gradients, move their experts and send them to all workers.

Shape suffixes: L MoE layers, E experts.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import numpy as np
import torch

from moe_ray.errors import NotTrainable
from moe_ray.experts import Mask
from moe_ray.finetuning.collectives import gradient_or_zeros
from moe_ray.finetuning.expert_owners import ExpertOwners


def update_experts(
    owners: ExpertOwners,
    optimizer: torch.optim.Optimizer,
    masks: Sequence[Mask],
    weights: Sequence[float],
    *,
    max_grad_norm: float,
    step: int,
) -> float:
    """Moves the experts of a step's batches and puts them into the model; a collective.

    Args:
        owners: of the parameters; each has the gradients of its own, see `average_gradients`.
        optimizer: of the parameters; their gradients are gone afterwards.
        masks: (L, E) of the step's batches, of all workers.
        weights: of those batches.
        max_grad_norm: gradients are scaled down to it; 0 = they are not.
        step: 0-based, for messages.

    Returns:
        the gradients' norm before they were scaled down, the same on all workers.

    Raises:
        NotTrainable: it is not finite, or the experts are not after the step; the model has not changed.
    """
    trainable = owners.trainable
    mask_LE: Mask = np.any(masks, axis=0)
    experts = trainable.experts_of(mask_LE)
    own = owners.own_parameters(experts)
    for parameter in own:
        parameter.grad = gradient_or_zeros(parameter)
    norm_tensor = owners.gradient_norm(experts)
    torch.nn.utils.clip_grads_with_norm_(own, max_grad_norm or math.inf, norm_tensor)
    norm = norm_tensor.item()
    # The same number on all workers, so they all stop here, and none waits for another.
    if not math.isfinite(norm):
        raise NotTrainable(f"step {step}: the gradient's norm is {norm}; lower finetune.learning_rate")
    with steps_multiplied(owners, masks, weights):
        optimizer.step()
    owners.send(experts)
    optimizer.zero_grad(set_to_none=True)
    # The same on all workers again, and before anything is written into the model, a checkpoint or an adapter.
    if broken := trainable.out_of_range(mask_LE):
        layers = sorted({expert.layer for expert in broken})
        raise NotTrainable(
            f"step {step}: after the update {len(broken)} experts of layers {layers} hold infinite or "
            f"undefined weights, such as {broken[0]}; nothing of this step was saved, and what was before stays; "
            "lower finetune.learning_rate, or set finetune.dtype=float32 and a model.dtype of a larger range"
        )
    trainable.write_back(mask_LE)
    return norm


@contextmanager
def steps_multiplied(owners: ExpertOwners, masks: Sequence[Mask], weights: Sequence[float]) -> Iterator[None]:
    """What an optimiser step moves inside moves by the mean weight of the batches that hold it.

    The step and not the gradient: AdamW divides by the gradient's own size, so a factor on it would do nothing.

    Args:
        owners: of the parameters, of which the step moves this worker's own.
        masks: (L, E) of the step's batches.
        weights: of those batches.
    """
    if all(weight == 1.0 for weight in weights):
        yield
        return
    total_LE = np.sum([mask * weight for mask, weight in zip(masks, weights, strict=True)], axis=0)
    factor_LE = total_LE / np.maximum(np.sum(masks, axis=0), 1)
    moving = [
        (parameter, float(factor_LE[owners.trainable.moe_layers.row_of(expert.layer), expert.expert]))
        for expert in owners.own(owners.trainable.experts_of(np.any(masks, axis=0)))
        for parameter in owners.trainable.parameters[expert].values()
    ]
    before = [parameter.detach().clone() for parameter, _ in moving]
    yield
    with torch.no_grad():
        for (parameter, factor), start in zip(moving, before, strict=True):
            parameter.copy_(torch.lerp(start, parameter, factor))
