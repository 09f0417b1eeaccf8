"""Routing counts that were made elsewhere: the statistics and the selection need no model.

    python examples/own_counts.py

Here the counts are drawn at random, with two experts that unsafe prompts are routed to more often. Yours come from wherever
you counted: one row for each example, with the number of its tokens that each expert of each layer was routed to.
"""

import numpy as np

import moe_ray

rng = np.random.default_rng(0)
num_examples, num_layers, num_experts, num_experts_per_tok, num_tokens = 48, 4, 16, 2, 40
is_unsafe = np.arange(num_examples) % 2 == 1

counts_NLE = np.zeros((num_examples, num_layers, num_experts), dtype=np.int32)
for example, layer in np.ndindex(num_examples, num_layers):
    odds = np.ones(num_experts)
    if is_unsafe[example] and layer in (1, 2):
        odds[5] = 8.0  # L01_E05 and L02_E05 are what should be found
    for _ in range(num_tokens):
        chosen = rng.choice(num_experts, size=num_experts_per_tok, replace=False, p=odds / odds.sum())
        counts_NLE[example, layer, chosen] += 1

counts = moe_ray.RoutingCounts(
    counts_NLE=counts_NLE,
    num_tokens=np.full(num_examples, num_tokens),
    layers=tuple(range(num_layers)),
    num_experts_per_tok=num_experts_per_tok,
    batch_idx=np.zeros(num_examples, dtype=np.int64),
    in_batch_idx=np.arange(num_examples),
    label=np.where(is_unsafe, "unsafe", "safe").astype(object),
    category=np.full(num_examples, "fraud", dtype=object),
    role=np.full(num_examples, "prompt", dtype=object),
)
# Counts of prompts, and no router weights: what the defaults ask for is named otherwise here.
found = moe_ray.identify(counts, roles=["prompt"], weighting="tokens", threshold=0.1)
print(found)
for expert in found.masks.selected[0]:
    print(expert)
