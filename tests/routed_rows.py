"""Rows of several lengths, and what a model routes of them."""

from __future__ import annotations

import numpy as np
from families import rows

from moe_ray.models.moe_layers import find_moe_layers
from moe_ray.routing.capture import count_rows, counts_from_forward
from moe_ray.routing.counter import counting

ROWS = rows((7, 4), (3, 2), (5, 6), (9, 0))


def captured(model, some_rows):
    with counting(model) as counter:
        return count_rows(model, counter, some_rows, pad_id=0)


def as_counts(model, some_rows, batch_idx, *, ids=False):
    with counting(model, ids=ids) as counter:
        counts, num_tokens = count_rows(model, counter, some_rows, pad_id=0)
    return counts_from_forward(
        counts,
        num_tokens,
        batch_idx=[batch_idx] * len(some_rows),
        in_batch_idx=range(len(some_rows)),
        label=["safe"] * len(some_rows),
        category=[""] * len(some_rows),
        ids=counter.last_ids,
        moe_layers=find_moe_layers(model),
    )


def counts_of_ids(ids: np.ndarray, num_experts: int) -> np.ndarray:
    return np.stack([np.bincount(ids[:, layer].ravel(), minlength=num_experts) for layer in range(ids.shape[1])])
