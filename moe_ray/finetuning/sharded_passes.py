"""Passes that a worker runs only because others run theirs: over a sharded model every pass is a collective."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist
from transformers import PreTrainedModel

from moe_ray.config.finetune import FinetuneConfig
from moe_ray.models.loss import answer_loss, micro_batches
from moe_ray.models.tokenization import TokenizedRow


def passes_to_add(batches: Sequence[Sequence[TokenizedRow]], *, config: FinetuneConfig, device: torch.device) -> int:
    """How many passes this worker's batches are short of those of the worker with most; a collective.

    Args:
        batches: of this worker in a step; there may be none.
        config: size of micro-batches.
        device: of the model.
    """
    own = sum(
        len(
            micro_batches(
                rows,
                rows_per_forward=config.rows_per_forward,
                tokens_per_forward=config.tokens_per_forward,
                tokens_of_a_pass=config.tokens_of_a_pass,
            )
        )
        for rows in batches
    )
    most = torch.tensor(own, device=device)
    dist.all_reduce(most, op=dist.ReduceOp.MAX)
    return int(most.item()) - own


def empty_pass(model: PreTrainedModel, *, pad_id: int) -> None:
    """Forward and backward of two tokens, from which nothing gets a gradient."""
    (answer_loss(model, [TokenizedRow([pad_id], [pad_id])], pad_id=pad_id).sum() * 0).backward()  # type: ignore[no-untyped-call]
