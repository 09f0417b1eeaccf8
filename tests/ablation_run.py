"""What a causal check leaves in a run directory, written without a model: for what reads a finished run."""

from __future__ import annotations

import numpy as np
import pandas as pd

from moe_ray.ablation.ablate import Ablation, found_in
from moe_ray.ablation.effects import BatchEffects, Cost
from moe_ray.config.ablate import AblateConfig
from moe_ray.orchestration.stages.ablate import write_findings
from moe_ray.storage.folder import Folder
from moe_ray.storage.stage import finish


def write_ablation(
    folder: Folder, *, categories: tuple[str, ...] = ("fraud", "theft"), num_batches: int = 4
) -> Ablation:
    """A finished stage of batches whose selection is the cause, in the folder of a run."""
    rng = np.random.default_rng(0)
    measured = [_batch(rng, batch, categories[batch % len(categories)]) for batch in range(num_batches)]
    found = found_in(measured, AblateConfig(relabellings=2000), seed=0)
    write_findings(folder.sub("ablate"), found)
    finish(folder.sub("ablate"), {}, found.as_dict(), seconds=4.0)
    return found


def _batch(rng: np.random.Generator, batch: int, category: str) -> BatchEffects:
    labels = ["unsafe"] * 8 + ["safe"] * 8
    sets = [("selected", 0, ""), *(("matched", draw, "") for draw in range(5)), ("busiest", 0, ""), ("other", 0, "")]
    sets += [("global", 0, ""), ("forced", 0, ""), ("forced_matched", 0, ""), ("coalition", 1, "")]
    sets += [("alone", 0, "L01_E03"), ("spared", 0, "L01_E03"), ("alone", 0, "L02_E02")]
    rows = []
    for name, draw, expert in sets:
        size = {"selected": 1.5, "alone": 0.5, "coalition": 0.5, "busiest": 1.4}.get(name, 0.0)
        for place, label in enumerate(labels):
            effect = rng.normal() * 0.05 + size * (label == "unsafe")
            rows.append(
                {
                    "batch_idx": batch, "category": category, "set": name, "draw": draw, "expert": expert,
                    "id": f"{batch}-{place}", "label": label, "pair": None, "effect": effect, "experts": 2, "share": 0.2,
                }
            )  # fmt: skip
    answers = pd.DataFrame(
        {
            "batch_idx": batch, "category": category, "id": [f"{batch}-{place}" for place in range(16)], "label": labels,
            "state": "answered", "answer": "Sure.", "answer_without": "No.", "refused_without": [True] * 8 + [False] * 8,
        }
    )  # fmt: skip
    return BatchEffects(effects=pd.DataFrame(rows), answers=answers, cost=Cost(forwards=40, tokens=12_345))
