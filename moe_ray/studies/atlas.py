"""An atlas of experts: which are unsafe, for which categories, and in how many runs, as plain values for JSON."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd

from moe_ray.config.for_others import checkpoint_for_others
from moe_ray.errors import InputError
from moe_ray.experts import Expert, masks_from_experts
from moe_ray.identification.overlap import batch_overlap
from moe_ray.run_directory import RunDirectory

ATLAS_FORMAT = 1


def expert_atlas(runs: Sequence[RunDirectory]) -> dict[str, Any]:
    """The unsafe experts of one run, or of several on one model, such as over seeds.

    Args:
        runs: each finished identification; of models of the same layers and experts.

    Returns:
        `format`; `model` with `name`, `layers` and `num_experts` of a layer; `runs`, each with `seed`, `mask_hash`,
        `batches` and `union_experts`; `experts`, those of most runs first, each with `name`, `layer`, `expert`, `runs`
        (in how many it is in the union) and `categories`: for each category `runs`, and as means over those `share` of its
        batches (0 to 1) and `risk_diff`; `agreement`: for each pair of runs the `jaccard` index of their unions, what
        chance would give (`expected`), and `corrected` for it, null where neither has any. No prompts.

    Raises:
        InputError: there is none, one is not identified, or they are of models with other layers or experts.
    """
    if not runs:
        raise InputError("got no run, expected one or more that finished identification")
    shapes = [(run.masks.layers, int(run.masks.union.shape[1])) for run in runs]
    for run, shape in zip(runs, shapes, strict=True):
        if shape != shapes[0]:
            raise InputError(
                f"{run.folder.url}: its model has {len(shape[0])} MoE layers of {shape[1]} experts, that of the first run "
                f"{len(shapes[0][0])} of {shapes[0][1]}; give runs on one model"
            )
    layers, num_experts = shapes[0]
    unions = {index: tuple(run.masks.union_experts) for index, run in enumerate(runs)}
    pairs = batch_overlap(masks_from_experts(unions, layers=layers, num_experts=num_experts))
    return {
        "format": ATLAS_FORMAT,
        "model": {"name": _model_name(runs[0]), "layers": list(layers), "num_experts": num_experts},
        "runs": [
            {
                "seed": run.config.seed,
                "mask_hash": run.masks.digest(),
                "batches": len(run.masks.batch_idx),
                "union_experts": len(unions[index]),
            }
            for index, run in enumerate(runs)
        ],
        "experts": _experts(runs, unions),
        "agreement": [
            {
                "runs": [int(pair["batch_a"]), int(pair["batch_b"])],
                **{key: _number(pair[key]) for key in ("jaccard", "expected", "corrected")},
            }
            for pair in pairs.to_dict("records")
        ],
    }


def _experts(runs: Sequence[RunDirectory], unions: dict[int, tuple[Expert, ...]]) -> list[dict[str, Any]]:
    by_category = pd.concat([run.by_category.assign(run=index) for index, run in enumerate(runs)])
    numbers = pd.Series([expert for union in unions.values() for expert in union]).value_counts()
    atlas = []
    for _, rows in by_category.groupby(["layer", "expert"], sort=True):
        found = Expert(int(rows["layer"].iloc[0]), int(rows["expert"].iloc[0]))
        categories = {
            str(category): {
                "runs": int(of_category["run"].nunique()),
                "share": _number(of_category["share"].mean()),
                "risk_diff": _number(of_category["risk_diff"].mean()),
            }
            for category, of_category in rows.groupby("category", sort=True)
        }
        atlas.append(
            {
                "name": str(found),
                "layer": found.layer,
                "expert": found.expert,
                "runs": int(numbers[found]),
                "categories": categories,
            }
        )
    return sorted(atlas, key=lambda entry: -entry["runs"])


def _model_name(run: RunDirectory) -> str:
    """Its name on the hub, or the last part of a folder."""
    return checkpoint_for_others(run.config.model.path).removeprefix("./")


def _number(value: Any) -> float | None:
    return None if value is None or not np.isfinite(value) else round(float(value), 6)
