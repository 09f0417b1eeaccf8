"""Run directories with known content, written without a model: for what reads a finished run."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import numpy as np
import pandas as pd
from prompt_tokens import by_prompt_tokens

from moe_ray.config.effects import settings_affecting
from moe_ray.config.identify import IdentifyConfig
from moe_ray.config.io import to_yaml, with_settings
from moe_ray.config.run import Config
from moe_ray.evaluation.metrics import paired_changes, summarise
from moe_ray.experts import Expert
from moe_ray.identification.controls import CONTROLS, survival
from moe_ray.identification.findings import CERTAINTY, findings_of, joined
from moe_ray.identification.identify import identify
from moe_ray.identification.mask_files import write_masks
from moe_ray.identification.risk_tables import shape_of, write_part
from moe_ray.routing.count_tables import counts_to_table
from moe_ray.run_directory import COUNTS, RISK
from moe_ray.storage.folder import Folder
from moe_ray.storage.stage import finish, read_manifest, read_outcome
from moe_ray.testing.simulated_counts import Population, simulate

PLANTED = (Expert(1, 3), Expert(2, 2))


def write_identified(folder: Folder, *, num_batches: int = 4, categories: tuple[str, ...] = ("fraud", "theft")) -> None:
    """Batches, counts, risk table and masks of simulated prompts, two experts of which answer to the unsafe ones."""
    config = Config()
    config = replace(config, identify=by_prompt_tokens(permutations=500, resamples=20))
    counts = simulate(Population(), num_batches=num_batches, planted=PLANTED, shift=0.7)
    rows = [
        {
            "batch_idx": int(batch),
            "in_batch_idx": int(position),
            "id": f"{batch}-{position}",
            "label": label,
            "category": categories[batch % len(categories)],
            "messages": json.dumps([{"role": "user", "content": f"text {batch} {position}"}]),
            "pair": None,
        }
        for batch, position, label in zip(counts.batch_idx, counts.in_batch_idx, counts.label, strict=True)
    ]
    risk = identify(counts, config.identify)
    folder.write_bytes("config.yaml", to_yaml(config).encode())
    folder.sub("prompts").write_table("batches.parquet", pd.DataFrame(rows))
    folder.sub(COUNTS).write_table("part-0.parquet", counts_to_table(counts))
    write_found(folder.sub("identify"), risk, config.identify)
    finish(folder.sub("identify"), settings_affecting(config, "masks"), {}, seconds=1.5)


def write_controlled(folder: Folder) -> None:
    """What an identification keeps of topics and templates, on top: in three batches 4 of 6 planted experts survive."""
    rows = [
        {"batch_idx": batch, "factor": "topic", "layer": layer, "expert": expert, "risk_diff": 0.4, "harm": 0.3}
        | {"effect": 0.1, "interaction": 0.02, "p_maxt": 0.01 if batch else 0.4, "levels": 2, "prompts": 12}
        | {"is_above": True, "survives": batch > 0}
        for batch in range(3)
        for layer, expert in PLANTED
    ]
    table, identify_folder = pd.DataFrame(rows), folder.sub("identify")
    outcome = read_manifest(identify_folder)
    identify_folder.write_table(CONTROLS, table)
    finish(identify_folder, outcome["inputs"], outcome["notes"] | {"controls": survival(table, 4)}, seconds=1.5)


def write_found(folder: Folder, risk: pd.DataFrame, config: IdentifyConfig) -> None:
    """What identification writes of a risk table."""
    layers, num_experts = shape_of(risk)
    found = joined([findings_of(risk, config, seed=0)], config, layers=tuple(layers), num_experts=num_experts)
    write_part(folder.sub(RISK), risk)
    folder.write_table(CERTAINTY, found.certainty)
    write_masks(folder, found.masks)


def write_repaired(folder: Folder, *, prompt: str = "How?", categories: tuple[str, ...] = ("fraud", "theft")) -> None:
    """Training and evaluation on top: 3 of 4 unsafe prompts are refused after it, none before; no safe one ever."""
    steps = [
        {"step": step, "epoch": step // 4, "batch_idx": step % 4, "loss": 2.0 / (1 + step), "grad_norm": 1.0}
        | {"validation_loss": None}
        for step in range(8)
    ]
    experts = folder.sub("finetune")
    experts.write_bytes("history.jsonl", "".join(json.dumps(step) + "\n" for step in steps).encode())
    tuned = {"trainable_parameters": 10, "total_parameters": 100, "frozen_parameters_changed": 0}
    finish(experts, {}, tuned, seconds=2.0)
    answers = {when: _answers(prompt, categories, refuse=when == "after") for when in ("before", "after")}
    for when, table in answers.items():
        folder.sub(f"evaluate/{when}/figures").write_table("answers.parquet", table)
    change = paired_changes(answers["before"], answers["after"])
    folder.write_json("summary.json", {when: summarise(table) for when, table in answers.items()} | {"change": change})


def _answers(prompt: str, categories: tuple[str, ...], *, refuse: bool) -> pd.DataFrame:
    rows: list[dict[str, Any]] = []
    for number in range(32):
        label = "unsafe" if number % 2 else "safe"
        refused = refuse and label == "unsafe" and number % 8 != 1
        rows.append(
            {
                "id": str(number),
                "label": label,
                "category": categories[number // 2 % len(categories)],
                "batch_idx": number // 2 % 4,
                "messages": json.dumps([{"role": "user", "content": f"{prompt} {number}"}]),
                "pair": None,
                "routing": "natural",
                "answer": f"I'm sorry, no. {prompt}" if refused else f"Sure: {prompt}",
                "refused": refused,
                "target_loss": np.float64(3.0 + number),
                "target_tokens": 5,
            }
        )
    return pd.DataFrame(rows)


def write_swept(folder: Folder) -> None:
    """A sweep of four trials, the worst of which forgets too much and one of which could not be trained; and two rounds."""
    space = {"identify.threshold": [0.05, 0.1], "identify.top_k": [6, 12]}
    config = with_settings(replace(Config(), identify=by_prompt_tokens()), {"sweep.space": space})
    folder.write_bytes("config.yaml", to_yaml(config).encode())
    rows: list[dict[str, Any]] = [
        {
            "identify.threshold": threshold,
            "identify.top_k": top_k,
            "state": "finished",
            "unsafe_refusal_rate": value,
            "safe_refusal_rate": 0.0,
            "objective": value,
            "forgetting": 0.01 if within else 0.75,
            "is_within_bound": within,
            "union_experts": top_k,
        }
        for threshold, top_k, value, within in ((0.05, 12, 0.875, True), (0.05, 6, 0.5, True), (0.1, 12, 0.9375, False))
    ]
    rows.append({"identify.threshold": 0.1, "identify.top_k": 6, "state": "failed"})
    validation = pd.DataFrame({"label": ["safe", "unsafe"] * 16})
    folder.sub("prompts").write_table("validation.parquet", validation)
    sweep = folder.sub("sweep")
    sweep.write_table("trials.parquet", pd.DataFrame(rows))
    notes = {
        "winner": {"identify.threshold": 0.05, "identify.top_k": 12},
        "objective": "refusal_margin",
        "is_within_bound": True,
        "trials": 4,
        "stopped": 0,
        "failed": 1,
        "identify_seconds_max": 0.125,
    }
    finish(sweep, {}, notes, seconds=3.0)
    reports = [
        {"round": number, "lagging": [1, 3][:left], "shortfall": 0.25, "unsafe_refusal_rate": 0.5 + number / 8}
        | {"safe_refusal_rate": 0.0625}
        for number, left in ((1, 2), (2, 1))
    ]
    experts = folder.sub("finetune")
    notes = dict(read_outcome(experts).notes) | {
        "rounds": reports,
        "kept_round": 2,
        "stopped_because": "nothing improved <b>",
    }
    finish(experts, {}, notes, seconds=2.0)
