"""Counts of batches with answers, refusals and every score, as a capture would give them."""

from __future__ import annotations

import numpy as np

from moe_ray.routing.counts import RoutingCounts, concat_counts

L, E, K = 2, 3, 1
PROMPTS = 6
"""Of each label in a batch."""


def answered(seed=0, *, batch_idx=0, planted=0.0, prompts=PROMPTS) -> RoutingCounts:
    """A batch with a prompt and an answer of each example, and every score; expert (1, 2) counts more on unsafe ones."""
    rng = np.random.default_rng(seed)
    num = 2 * prompts
    is_unsafe = np.repeat([False, True], prompts)
    label = np.where(is_unsafe, "unsafe", "safe").astype(object)

    def counts_of(tokens):
        return np.stack([rng.multinomial(size, np.full(E, 1 / E), size=L) for size in tokens]).astype(np.int32)

    def score(planted=planted):
        values = rng.random((num, L, E)).astype(np.float32) + 1
        values[is_unsafe, 1, 2] += planted
        return values

    def both(of_answers):
        return np.concatenate([np.zeros_like(of_answers), of_answers])

    tokens = rng.integers(5, 12, size=2 * num)
    refusal_tokens = np.where(is_unsafe, rng.integers(5, 12, size=num), 0)
    counts = RoutingCounts(
        batch_idx=np.full(2 * num, batch_idx),
        in_batch_idx=np.tile(np.arange(num), 2),
        label=np.tile(label, 2),
        category=np.full(2 * num, "", dtype=object),
        role=np.repeat(["prompt", "response"], num).astype(object),
        num_tokens=tokens,
        counts_NLE=counts_of(tokens),
        layers=(0, 1),
        num_experts_per_tok=K,
        attribution_NLE=both(score()),
        gate_NLE=both(score()),
        gate_refusal_NLE=both(np.where(is_unsafe[:, None, None], score(planted=0.0), 0).astype(np.float32)),
        reap_NLE=(rng.random((2 * num, L, E)) * 5).astype(np.float32),
        refusal_NLE=both(counts_of(refusal_tokens)),
        refusal_tokens=both(refusal_tokens),
    )
    return concat_counts([counts])
