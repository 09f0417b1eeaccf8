"""What a training run does when: which batches a step trains and on which worker, at which learning rate, when to stop."""

from __future__ import annotations

import hashlib
import heapq
import math
from collections.abc import Mapping, Sequence
from typing import Literal

import numpy as np

Plan = list[tuple[int, ...]]
"""Per step its `batch_idx`s, always equally many; -1 = none left in this epoch."""

_WINDOWS_PER_EPOCH = 4
"""At least: windows of a whole epoch would put the same batches together in every epoch."""


def plan_steps(
    batch_ids: Sequence[int],
    *,
    epochs: int,
    batches_per_step: int,
    seed: int,
    lengths: Mapping[int, int] | None = None,
    window: int = 0,
) -> Plan:
    """Which batches each step trains: a new order every epoch, the same for the same seed.

    A step takes as long as its slowest worker, so its batches should be alike in length. The batches of `window` steps,
    drawn at random, are sorted by length and cut into steps, and the steps of the epoch are shuffled. Which batches share
    a step then depends on chance and length, and when a step comes on chance alone. (The `Trainer` of transformers groups
    by length in the same windows, `get_length_grouped_indices`, but starts each with the longest.)

    Args:
        batch_ids: of the batches to train.
        epochs: passes over them.
        batches_per_step: with 1 there is nothing to even out, and the order is that of the draw.
        seed: of the order.
        lengths: how much there is to compute for each batch, in any unit; None = not known, as with `window` 0.
        window: steps whose batches are sorted together, at most a quarter of an epoch's; 0 or 1 = none are.
    """
    steps: Plan = []
    for epoch in range(epochs):
        random = np.random.default_rng([seed, epoch])
        order = random.permutation(np.asarray(batch_ids)).tolist()
        order += [-1] * (-len(order) % batches_per_step)
        num_steps = len(order) // batches_per_step
        size = min(window, num_steps // _WINDOWS_PER_EPOCH) * batches_per_step
        if lengths is None or batches_per_step == 1 or size <= batches_per_step:
            steps += _cut(order, batches_per_step)
            continue
        of_epoch = [
            step
            for drawn in _cut(order, size)
            # Missing batches are sorted to the front and so stand in one step together.
            for step in _cut(sorted(drawn, key=lambda batch: lengths.get(batch, -1)), batches_per_step)
        ]
        steps += [of_epoch[position] for position in random.permutation(num_steps)]
    return steps


def _cut(order: Sequence[int], size: int) -> Plan:
    return [tuple(order[start : start + size]) for start in range(0, len(order), size)]


def share_out(batch_ids: Sequence[int], *, num_workers: int, lengths: Mapping[int, int] | None = None) -> list[int]:
    """Which worker trains each batch of a step: the same on all of them, and about as much to compute for each.

    The longest batch that is left goes to the worker with the least so far.

    Args:
        batch_ids: of the step; a -1 is shared out like a batch with nothing to do.
        num_workers: to share among.
        lengths: as in `plan_steps`; None = all alike, so that workers take turns.

    Returns:
        the worker's rank for each position.
    """
    costs = [0 if batch < 0 else 1 if lengths is None else lengths[batch] for batch in batch_ids]
    workers = [0] * len(batch_ids)
    # Of workers with equally much, the one with fewest batches: where nothing has a length, they still take turns.
    loads = [(0, 0, rank) for rank in range(num_workers)]
    for position in sorted(range(len(batch_ids)), key=lambda position: -costs[position]):
        load, count, rank = heapq.heappop(loads)
        workers[position] = rank
        heapq.heappush(loads, (load + costs[position], count + 1, rank))
    return workers


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
