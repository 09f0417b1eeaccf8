"""What a training run does when: which batches a step trains, at which learning rate, and when to stop."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from typing import Literal

import numpy as np

Plan = list[tuple[int, ...]]
"""Per step its `batch_idx`s, always equally many; -1 = none left in this epoch. Worker r of N takes those at r, r + N, …"""


def plan_steps(batch_ids: Sequence[int], *, epochs: int, batches_per_step: int, seed: int) -> Plan:
    """Which batches each step trains: a new order every epoch, the same for the same seed."""
    steps = []
    for epoch in range(epochs):
        order = np.random.default_rng([seed, epoch]).permutation(np.asarray(batch_ids)).tolist()
        order += [-1] * (-len(order) % batches_per_step)
        steps += [tuple(order[start : start + batches_per_step]) for start in range(0, len(order), batches_per_step)]
    return steps


def hash_plan(plan: Plan) -> str:
    """A hash of the batches of all steps."""
    return hashlib.sha256(repr(plan).encode()).hexdigest()[:16]


def learning_rate_factor(
    step: int, num_steps: int, *, schedule: Literal["constant", "linear", "cosine"], warmup: float
) -> float:
    """The share of the full learning rate at a step (0 to 1).

    Args:
        step: 0-based.
        num_steps: of the whole run.
        schedule: after the warm-up, the rate stays, or falls towards 0, which it would reach one step after the last.
        warmup: share of the steps in which the rate rises evenly (0 to 1).
    """
    num_warmup = math.ceil(warmup * num_steps)
    if step < num_warmup:
        return (step + 1) / num_warmup
    done = (step - num_warmup) / max(1, num_steps - num_warmup)
    return {"constant": 1.0, "linear": 1 - done, "cosine": 0.5 * (1 + math.cos(math.pi * done))}[schedule]


def has_stopped_improving(losses: Sequence[float], patience: int) -> bool:
    """The last `patience` validation losses are all no lower than the best before them; never with patience 0."""
    return 0 < patience < len(losses) and min(losses[-patience:]) >= min(losses[:-patience])
