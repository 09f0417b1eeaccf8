"""What two runs found, held against each other: counts, masks, learned experts, history, answers and figures."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from safetensors.numpy import load_file

from moe_ray.routing.count_store import read_counts
from moe_ray.run_directory import RunDirectory

LOSS_TOLERANCE = 1e-4
"""Nats; what is answered after a resume may share its forward pass with other rows."""

_OF_THE_CLOCK = re.compile("second|per_s|reused|mlflow|mfu|tokens_per")
_SINCE_THE_RESUME = ("output_movement",)
"""Measured from where a training was resumed, as its docstring says, and so another number by design."""
_OF_ONE_RUN = (
    (r"part-[\w-]+\.parquet", "part"),
    (r"(answers|neutral|routing|verdicts)-[0-9a-f]+\.parquet", r"\1"),
    (r"/\d+\.log", "/log"),
)


def differences(one: Path, other: Path) -> list[str]:
    """Names of what is not the same in both run directories, with where; empty = nothing."""
    found = []
    counts = [read_counts(RunDirectory.open(str(run)).counts_folder) for run in (one, other)]
    for name in ("batch_idx", "in_batch_idx", "role", "num_tokens", "counts_NLE"):
        if not np.array_equal(*(getattr(each, name) for each in counts)):
            found.append(f"counts: {name}")
    masks = [np.load(run / "identify" / "masks.npz", allow_pickle=False) for run in (one, other)]
    if masks[0].files != masks[1].files or any(not np.array_equal(masks[0][n], masks[1][n]) for n in masks[0].files):
        found.append("masks")
    experts = [load_file(run / "finetune" / "experts.safetensors") for run in (one, other)]
    if experts[0].keys() != experts[1].keys() or any(
        not np.array_equal(experts[0][n], experts[1][n]) for n in experts[0]
    ):
        found.append("learned experts")
    history = [
        [json.loads(line) for line in (run / "finetune" / "history.jsonl").read_text().splitlines()]
        for run in (one, other)
    ]
    found += _unequal(*history, "history")
    for when in ("before", "after"):
        tables = [
            pd.read_parquet(run / "evaluate" / when / "figures" / "answers.parquet")
            .sort_values(["routing", "id"])
            .to_dict("records")
            for run in (one, other)
        ]
        found += _unequal(*tables, f"answers {when}")
    summaries = [json.loads((run / "summary.json").read_text()) for run in (one, other)]
    return found + _unequal(*summaries, "summary")


def _unequal(one: Any, other: Any, where: str) -> list[str]:
    """Where two values of JSON differ, apart from what a clock or a run's own name has in it."""
    if isinstance(one, dict) and isinstance(other, dict):
        return [
            found
            for key in sorted(one.keys() | other.keys())
            if not _OF_THE_CLOCK.search(str(key)) and key not in _SINCE_THE_RESUME
            for found in _unequal(one.get(key), other.get(key), f"{where}: {key}")
        ]
    if isinstance(one, list | tuple) and isinstance(other, list | tuple) and len(one) == len(other):
        return [
            found
            for index, pair in enumerate(zip(one, other, strict=True))
            for found in _unequal(*pair, f"{where}[{index}]")
        ]
    if isinstance(one, float) and isinstance(other, float):
        return (
            [] if abs(one - other) <= LOSS_TOLERANCE or (one != one and other != other) else [f"{where}: {one} {other}"]
        )
    return [] if one == other else [f"{where}: {one!r} {other!r}"[:200]]


def files_of(run: Path) -> set[str]:
    """Paths of the run's files, those whose names say how the work was cut into parts by what they are."""
    found = set()
    for path in run.rglob("*"):
        if path.is_file():
            name = path.relative_to(run).as_posix()
            for pattern, known in _OF_ONE_RUN:
                name = re.sub(pattern, known, name)
            if not name.startswith("mlflow/artifacts"):
                found.add(name)
    return found
