"""Stage `identify`: risk differences, unsafe experts and masks of every batch."""

from __future__ import annotations

import io
import logging
from dataclasses import replace
from typing import Any

import numpy as np
import pandas as pd

from moe_ray.config.effects import settings_affecting
from moe_ray.experts import ExpertMasks
from moe_ray.identification.controls import COLUMNS, CONTROLS, FACTORS, controls_of_batches, survival
from moe_ray.identification.findings import CERTAINTY
from moe_ray.identification.identify import STATISTIC
from moe_ray.identification.mask_files import MASKS, write_masks
from moe_ray.identification.pandas_export import export_bytes, export_name, export_pickle
from moe_ray.identification.risk_tables import RiskParts
from moe_ray.models.loading import num_decoder_layers
from moe_ray.orchestration.jobs import identify as job
from moe_ray.orchestration.stages.context import Context
from moe_ray.routing.count_store import batches_in_parts, plan_reads, read_batches
from moe_ray.run_directory import CAPTURE, IDENTIFY, PROMPTS, RISK
from moe_ray.storage.folder import Folder
from moe_ray.storage.stage import MADE, Outcome, Stage
from moe_ray.studies.trial import only_what_selects

logger = logging.getLogger(__name__)

MOST_CONTROLLED, _BATCHES_AT_ONCE = 500, 8
"""Batches that are controlled for topic and template, spread evenly over all; and how many are read together."""

MOST_EXPORT_BYTES = 64 * 10**6
"""The pickle for pandas users, which is made in memory several times over, is written up to this size of its masks."""


def identify(run: Context) -> Outcome:
    """Makes `masks`. The export for pandas users holds targets, and controls use fields, so both are among the inputs."""
    inputs = {
        "counts": run.made(CAPTURE, "counts"),
        "targets": run.made(PROMPTS, "targets"),
        "fields": run.made(PROMPTS, "fields"),
        **run.settings("masks"),
        "seed": run.config.seed,
        "statistic": STATISTIC,
    }
    return run.do(Stage(name=IDENTIFY, inputs=inputs, work=lambda folder: _identify(run, folder)))


def selecting_settings(run: Context) -> dict[str, Any]:
    """The settings `identify.*` that decide which experts are selected, without those that only say how sure it is."""
    config = replace(run.config, identify=only_what_selects(run.config.identify))
    found = settings_affecting(config, "masks")
    return {key: value for key, value in found.items() if key.startswith("identify.")}


def _identify(run: Context, folder: Folder) -> dict[str, Any]:
    run.models.make_room_for_tasks()
    masks, certainty = job.identify(run.directory, folder, run.config.identify, seed=run.config.seed)
    folder.write_table(CERTAINTY, certainty)
    write_masks(folder, masks)
    _export(run, folder, masks)
    controls, num_controlled = _controls(run, masks)
    folder.write_table(CONTROLS, controls)
    without_mask = np.setdiff1d(run.directory.stored_batches.columns("batch_idx")["batch_idx"], masks.batch_idx)
    return {
        "union_experts": len(masks.union_experts),
        "batches_without_mask": without_mask.tolist(),
        "controls": survival(controls, num_controlled),
        MADE: {"masks": masks.digest()},
    }


def _controls(run: Context, masks: ExpertMasks) -> tuple[pd.DataFrame, int]:
    """What is left of the selection within topics and templates, and of how many batches that was asked."""
    stored = run.directory.stored_batches.columns("batch_idx", "in_batch_idx", *FACTORS)
    if not any(stored[factor].astype(str).str.len().any() for factor in FACTORS):
        return pd.DataFrame(columns=[*COLUMNS]), 0
    trained = masks.trained_batches
    number = min(len(trained), MOST_CONTROLLED)
    chosen = [trained[place * len(trained) // number] for place in range(number)]
    stored = stored[stored["batch_idx"].isin(chosen)]
    config, parts = run.config.identify, run.directory.counts_folder
    where = batches_in_parts(parts, config.roles)
    tables = [
        controls_of_batches(read_batches(parts, names, group), stored, masks.selected, config, seed=run.config.seed)
        for group, names in plan_reads(where[where["batch_idx"].isin(chosen)], batches_at_once=_BATCHES_AT_ONCE)
    ]
    found = [table for table in tables if len(table)]
    return (pd.concat(found, ignore_index=True) if found else tables[0]), number


def _export(run: Context, folder: Folder, masks: ExpertMasks) -> None:
    size = export_bytes(masks)
    if size > MOST_EXPORT_BYTES:
        logger.info(
            "identify: no pickle for pandas users: it would hold %d MB of masks, and is written up to %d MB; read the "
            "parts in %s with pandas.read_parquet, and %s with numpy.load",
            *(size // 10**6, MOST_EXPORT_BYTES // 10**6, folder.file(RISK), folder.file(MASKS)),
        )
        return
    data = io.BytesIO()
    export_pickle(
        data,
        masks=masks,
        risk=RiskParts(folder.sub(RISK)),
        batches=run.directory.captured_examples,
        model_name=run.model.path,
        num_experts_per_tok=run.directory.num_experts_per_tok,
        num_layers=num_decoder_layers(run.model),
        selection=run.config.identify,
    )
    folder.write_bytes(export_name(run.model.path), data.getvalue())
