"""Run directories of the size of real models, written without one: for what reads or draws a finished run."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pandas as pd
from ablation_run import write_ablation
from prompt_tokens import by_prompt_tokens
from run_directory import write_found, write_repaired

from moe_ray.config.effects import settings_affecting
from moe_ray.config.io import to_yaml
from moe_ray.config.run import Config
from moe_ray.experts import Expert
from moe_ray.identification.identify import identify
from moe_ray.routing.count_tables import counts_to_table
from moe_ray.run_directory import COUNTS
from moe_ray.storage.folder import Folder
from moe_ray.storage.stage import finish
from moe_ray.testing.simulated_counts import Population, simulate

CATEGORIES = (
    "chemical and biological weapons or drugs", "cybercrime intrusion", "copyright violations", "harassment bullying",
    "harmful", "illegal", "misinformation disinformation", "self-harm", "fraud and deception of elderly people by telephone",
    "privacy",
)  # fmt: skip


def write_large(folder: Folder, *, num_layers: int, num_experts: int, num_batches: int, distinct: int = 10) -> None:
    """A finished run, identified, checked, trained and evaluated, with as many layers, experts and batches.

    Args:
        folder: of the run.
        num_layers: MoE layers.
        num_experts: per layer.
        num_batches: of training.
        distinct: batches that are simulated; the others are like one of them, with other numbers of their own.
    """
    rng = np.random.default_rng(0)
    config = Config()
    config = replace(config, identify=by_prompt_tokens(permutations=500, resamples=20))
    size = Population(num_layers=num_layers, num_experts=num_experts, num_experts_per_tok=8)
    distinct = min(distinct, num_batches)
    parts = []
    for kind in range(distinct):
        planted = sorted({Expert(int(rng.integers(num_layers)), int(rng.integers(num_experts))) for _ in range(6)})
        counts = simulate(size, num_batches=1, planted=planted, shift=0.4, seed=kind)
        parts.append(identify(counts, config.identify).assign(batch_idx=kind))
    folder.write_bytes("config.yaml", to_yaml(config).encode())
    categories = CATEGORIES[: max(2, distinct)]
    rows = [
        {
            "batch_idx": batch, "in_batch_idx": place, "id": f"{batch}-{place}", "label": ("safe", "unsafe")[place % 2],
            "category": categories[batch % distinct % len(categories)], "pair": None,
            "messages": json.dumps([{"role": "user", "content": f"text {batch} {place}"}]),
        }
        for batch in range(num_batches)
        for place in range(16)
    ]  # fmt: skip
    folder.sub("prompts").write_table("batches.parquet", pd.DataFrame(rows))
    folder.sub(COUNTS).write_table("part-0.parquet", counts_to_table(counts))
    risk = pd.concat(
        [
            parts[batch % distinct].assign(
                batch_idx=batch, risk_diff=lambda t: t["risk_diff"] + rng.normal(0, 0.005, len(t))
            )
            for batch in range(num_batches)
        ],
        ignore_index=True,
    )
    write_found(folder.sub("identify"), risk, config.identify)
    finish(folder.sub("identify"), settings_affecting(config, "masks"), {}, seconds=1.5)
    write_ablation(folder, categories=categories, num_batches=min(num_batches, 32))
    write_repaired(folder, categories=categories)
