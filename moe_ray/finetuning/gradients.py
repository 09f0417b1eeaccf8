"""The gradient of one whole batch, and the average over the batches of a step.

Shape suffixes: L MoE layers, E experts.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import NamedTuple

import numpy as np
import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from moe_ray.config.finetune import FinetuneConfig
from moe_ray.experts import Mask
from moe_ray.finetuning.collectives import gradient_or_zeros
from moe_ray.finetuning.expert_owners import ExpertOwners
from moe_ray.finetuning.output_movement import OutputMovement
from moe_ray.finetuning.routing_policy import RoutingPolicy
from moe_ray.finetuning.trainable_experts import TrainableExperts
from moe_ray.models.loss import answer_loss, micro_batches
from moe_ray.models.tokenization import TokenizedRow


class BatchGradient(NamedTuple):
    """What `accumulate_gradient` saw.

    Attributes:
        loss: mean, in nats per answer token.
        num_tokens: answer tokens.
        num_input_tokens: tokens of prompts and answers.
        routed_LE: (L, E) experts that some token was routed to with a weight.
        restricted_LE: (L, E) the same of the tokens that the policy restricts.
    """

    loss: float
    num_tokens: int
    num_input_tokens: int
    routed_LE: Mask
    restricted_LE: Mask


def accumulate_gradient(
    model: PreTrainedModel,
    trainable: TrainableExperts,
    rows: Sequence[TokenizedRow],
    mask_LE: Mask,
    *,
    config: FinetuneConfig,
    pad_id: int,
    policy: RoutingPolicy | None = None,
    weight: float = 1.0,
    movement: OutputMovement | None = None,
) -> BatchGradient:
    """Adds the gradient of the mean loss over a whole batch's answer tokens; micro-batches only bound memory.

    Args:
        model: it routes as the policy says.
        trainable: its experts get the gradient.
        rows: the whole batch, with at least one answer token.
        mask_LE: (L, E) the batch's experts.
        config: size of micro-batches.
        pad_id: token id that fills padding.
        policy: of the step; None = that of the first step.
        weight: the gradient, not the loss that is returned, is multiplied by this.
        movement: may look at what the experts receive; None = nobody does.
    """
    policy = policy or RoutingPolicy.at_step(config, 0, 1)
    with trainable.training_on(mask_LE, policy) as batch:
        if movement is not None:
            movement.begin(batch)
        loss, num_tokens = backward_of_batch(
            model, rows, config=config, pad_id=pad_id, weight=weight, passing=batch.passing
        )
        if movement is not None:
            movement.take(batch)
        return BatchGradient(
            loss, num_tokens, sum(row.num_tokens for row in rows), batch.routed(), batch.routed_restricted()
        )


def _as_it_is(rows: Sequence[TokenizedRow]) -> AbstractContextManager[None]:
    return nullcontext()


def backward_of_batch(
    model: PreTrainedModel,
    rows: Sequence[TokenizedRow],
    *,
    config: FinetuneConfig,
    pad_id: int,
    weight: float,
    passing: Callable[[Sequence[TokenizedRow]], AbstractContextManager[None]] = _as_it_is,
) -> tuple[float, int]:
    """Runs backward from the mean loss over a whole batch's answer tokens, a micro-batch at a time.

    Args:
        model: to run.
        rows: the whole batch, with at least one answer token.
        config: size of micro-batches.
        pad_id: token id that fills padding.
        weight: the gradient is multiplied by this.
        passing: what forward and backward of the rows of a micro-batch run in.

    Returns:
        the mean loss (nats per token), without `weight`, and the number of answer tokens.
    """
    num_tokens = sum(len(row.answer_ids) for row in rows)
    # Added up where it is, as exactly as the host would: a number read in every pass would make the host wait in each.
    total = torch.zeros((), dtype=torch.float64, device=model.device)
    for group in micro_batches(
        rows,
        rows_per_forward=config.rows_per_forward,
        tokens_per_forward=config.tokens_per_forward,
        tokens_of_a_pass=config.tokens_of_a_pass,
    ):
        # By the tokens of the whole batch: a mean over each group's own would weigh a short group's tokens more, and the
        # gradient would depend on how the batch was cut.
        with passing(group):
            loss = answer_loss(model, group, pad_id=pad_id).sum() / num_tokens
            # Where tokens may go elsewhere, those of some rows may reach none of the batch's experts: nothing to learn.
            if loss.requires_grad:
                (loss * weight).backward()  # type: ignore[no-untyped-call]
        total += loss.detach().to(total)
    return total.item(), num_tokens


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


def average_gradients(owners: ExpertOwners, masks: Sequence[Mask], *, weights: Sequence[float]) -> None:
    """Averages each expert's gradient over the batches whose mask holds it; its owner ends with that, others with none.

    Args:
        owners: of this worker's parameters, which have the sum of its own batches' gradients, each times the batch's weight.
        masks: (L, E) masks of the step's batches, of all workers.
        weights: of those batches; an expert whose batches all have weight 0 gets zeros.
    """
    # Each expert over the batches that hold it: over all batches of the step, an expert that only one of them holds would
    # move by a fraction of what that batch asks for, the smaller the more batches a step has.
    total_LE = np.sum([mask * weight for mask, weight in zip(masks, weights, strict=True)], axis=0)
    # In one order on all workers, from the masks of all batches: collectives pair tensors by position, not by name.
    experts = owners.trainable.experts_of(np.any(masks, axis=0))
    owners.sum_gradients(experts)
    for expert in owners.own(experts):
        total = float(total_LE[owners.trainable.moe_layers.row_of(expert.layer), expert.expert])
        # Where all of an expert's batches have weight 0, the sum is 0 as well, and 0 / 0 would be NaN.
        if total != 1.0:
            for parameter in owners.trainable.parameters[expert].values():
                parameter.grad = gradient_or_zeros(parameter) / (total or 1.0)
