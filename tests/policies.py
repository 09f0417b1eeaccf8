"""The routing policies of training, and what each does to a model that trains nothing."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from typing import get_args

import numpy as np
from training_runs import CONFIG

from moe_ray.config.finetune import FinetuneConfig, TrainingRouting
from moe_ray.finetuning.routing_policy import RoutingPolicy
from moe_ray.models.tokenization import TokenizedRow
from moe_ray.routing.masking import route_rows_through, route_through, route_towards

BOOSTED = ("boosted", "annealed")
POLICIES = {kind: RoutingPolicy(kind=kind, boost=1.5 * (kind in BOOSTED)) for kind in get_args(TrainingRouting)}
ROUTINGS = tuple(POLICIES)


def config_of(routing: str, config: FinetuneConfig = CONFIG) -> FinetuneConfig:
    """The configuration with another policy."""
    return replace(config, routing=routing, boost=POLICIES[routing].boost)


def routed_so(model, mask_LE, routing: str, rows: Sequence[TokenizedRow]) -> AbstractContextManager[None]:
    """The policy in a pass of these rows, told row by row and position by position; natural = a boost of nothing."""
    if routing == "masked":
        return route_through(model, mask_LE)
    if routing not in ("masked_unsafe", "masked_prompt", "masked_response"):
        return route_towards(model, mask_LE, boost=POLICIES[routing].boost)
    length = max(row.num_tokens for row in rows)
    positions = [
        [
            {
                "masked_unsafe": row.is_unsafe and position < row.num_tokens,
                "masked_prompt": position < len(row.prompt_ids),
                "masked_response": len(row.prompt_ids) <= position < row.num_tokens,
            }[routing]
            for position in range(length)
        ]
        for row in rows
    ]
    return route_rows_through(model, np.stack([mask_LE] * len(rows)), np.asarray(positions))
