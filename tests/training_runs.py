"""Small trainings that many tests run, and what they moved."""

from __future__ import annotations

import torch
from families import batch_masks, rows

from moe_ray.config.finetune import FinetuneConfig
from moe_ray.finetuning.trainable_experts import trainable_experts
from moe_ray.finetuning.trainer import MaskedTrainer
from moe_ray.models.moe_layers import find_moe_layers

EXPERTS = {7: [(0, 1), (0, 5), (0, 6), (1, 3)], 3: [(0, 2), (0, 5), (1, 0), (1, 4)], 9: [(1, 3), (1, 7)]}
"""Per batch, (row of the layer, expert): short layers, an empty one, experts that batches share and do not share."""


BATCHES = {
    7: rows((5, 4), (3, 2), (7, 3), seed=1),
    3: rows((4, 3), (6, 5), seed=2),
    9: rows((2, 6), (5, 1), (4, 4), (3, 3), seed=3),
}


# Masked, where tokens go is watched most closely.
CONFIG = FinetuneConfig(routing="masked", epochs=2, learning_rate=1e-2, weight_decay=0.1, schedule="constant")


def train(model, config=CONFIG, *, per_batch=EXPERTS, after_step=None, **options):
    """Trains the model; returns the reports."""
    masks = batch_masks(model, per_batch)
    with trainable_experts(model, masks.union) as trainable:
        trainer = MaskedTrainer(model, trainable, BATCHES, masks, config, pad_id=0, seed=0, **options)
        return trainer.run(None if after_step is None else lambda report: after_step(trainer, report))


def changes(model, before) -> tuple[set[str], set[tuple[int, int]]]:
    """Names of changed tensors that are no expert's, and (row, expert) of experts with a changed number."""
    moe_layers = find_moe_layers(model)
    fused = {id(t): row for row, layer in enumerate(moe_layers) for t in layer.expert_tensors().values()}
    others, experts = set(), set()
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        if id(tensor) in fused:
            differs = (tensor != before[name]).flatten(1).any(dim=1)
            experts |= {(fused[id(tensor)], expert) for expert in differs.nonzero().flatten().tolist()}
        elif not torch.equal(tensor, before[name]):
            others.add(name)
    return others, experts


def assert_only_these_moved(model, before, experts) -> None:
    """The property of invariants 10 and 11: bit-identical everywhere else."""
    others, moved = changes(model, before)
    assert others == set()
    assert moved == set(experts)


def union_of(per_batch) -> set[tuple[int, int]]:
    return {pair for pairs in per_batch.values() for pair in pairs}
