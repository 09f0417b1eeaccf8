"""One of two workers that fine-tune together over gloo; started by test_workers.py, which is the other one."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from families import batch_masks, build, rows
from safetensors.torch import save_file
from torch import nn

from moe_ray.config.finetune import FinetuneConfig
from moe_ray.finetuning.trainable_experts import trainable_experts
from moe_ray.finetuning.trainer import MaskedTrainer

EXPERTS = {
    7: [(0, 1), (0, 5), (0, 6), (1, 3)],
    3: [(0, 2), (0, 5), (1, 0), (1, 4)],
    9: [(1, 3), (1, 7)],
    5: [(0, 5), (1, 6)],
}
BATCHES = {
    7: rows((5, 4), (3, 2), (7, 3), seed=1),
    3: rows((4, 3), (6, 5), seed=2),
    9: rows((2, 6), (5, 1), (4, 4), (3, 3), seed=3),
    5: rows((4, 4), (8, 2), seed=4),
}
RUNS = {"even": (7, 3, 9, 5), "uneven": (7, 3, 9)}
# Masked, where tokens go is watched most closely.
CONFIG = FinetuneConfig(routing="masked", epochs=2, learning_rate=1e-2, weight_decay=0.1, schedule="constant")
LENGTHS = {7: 40, 3: 10, 9: 10, 5: 10}
SHARED = replace(CONFIG, batches_per_step=4)
"""All four batches in every step; by `LENGTHS`, one worker trains 7 and the other one all others."""
POLICIES = {
    "masked_unsafe": replace(CONFIG, routing="masked_unsafe"),
    "masked_prompt": replace(CONFIG, routing="masked_prompt"),
    "annealed": replace(CONFIG, routing="annealed", boost=4.0),
    "alternating": replace(CONFIG, routing="natural", router="alternating"),
}
"""Policies that go by labels, by positions and by the step's number, and one under which routers learn too."""
STOPPING = replace(CONFIG, epochs=6, patience=1)
"""With a validation loss that never falls, this ends after two of the six epochs."""


def experts_of(run: str) -> dict[int, list[tuple[int, int]]]:
    """The run's batches with their experts."""
    return {batch: EXPERTS[batch] for batch in RUNS[run]}


def train(
    run: str, rank: int, world_size: int, config: FinetuneConfig = CONFIG, **options: Any
) -> tuple[nn.Module, list]:
    """Fine-tunes a fresh model; returns it and the reports."""
    model = build("olmoe")
    masks = batch_masks(model, experts_of(run))
    with trainable_experts(model, masks.union) as trainable:
        trainer = MaskedTrainer(
            model, trainable, BATCHES, masks, config, pad_id=0, seed=0, rank=rank, world_size=world_size, **options
        )
        return model, trainer.run()


def _padded(batches: list[list[int]]) -> torch.Tensor:
    return torch.tensor([[*step, *[-1] * (2 - len(step))] for step in batches])


def _not_on_this_rank() -> float:
    raise AssertionError("only rank 0 validates")


def join(folder: str, rank: int) -> None:
    """Meets the other worker."""
    dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=2)


def train_runs(folder: str, rank: int) -> None:
    """Trains every run together with the other worker and writes this worker's weights."""
    join(folder, rank)
    try:
        for run in RUNS:
            model, reports = train(run, rank, 2)
            batches = [[batch.batch_idx for batch in report.batches] for report in reports]
            told = {"losses": torch.tensor([report.loss for report in reports]), "batches": _padded(batches)}
            save_file({**model.state_dict(), **told}, Path(folder, f"{run}-{rank}.safetensors"))
        for name, config in POLICIES.items():
            save_file(train("even", rank, 2, config)[0].state_dict(), Path(folder, f"{name}-{rank}.safetensors"))
        reports = train("uneven", rank, 2, STOPPING, validate=(lambda: 1.0) if rank == 0 else _not_on_this_rank)[1]
        asked: list[list[int]] = []
        model, _ = train("even", rank, 2, SHARED, lengths=LENGTHS, before_epoch=lambda ids: asked.append(sorted(ids)))
        save_file({**model.state_dict(), "asked": torch.tensor(asked)}, Path(folder, f"shared-{rank}.safetensors"))
        steps = torch.tensor([report.step for report in reports])
        save_file({"steps": steps}, Path(folder, f"stopping-{rank}.safetensors"))
    finally:
        dist.destroy_process_group()


if __name__ == "__main__":
    train_runs(sys.argv[1], 1)
