"""Stage `identify`: risk differences, unsafe experts and masks of every batch."""

from __future__ import annotations

import io
import logging
from dataclasses import replace
from typing import Any

import numpy as np

from moe_ray.config.effects import settings_affecting
from moe_ray.experts import ExpertMasks
from moe_ray.identification.findings import CERTAINTY
from moe_ray.identification.identify import STATISTIC
from moe_ray.identification.mask_files import MASKS, write_masks
from moe_ray.identification.pandas_export import export_bytes, export_name, export_pickle
from moe_ray.identification.risk_tables import RiskParts
from moe_ray.models.loading import num_decoder_layers
from moe_ray.orchestration.jobs import identify as job
from moe_ray.orchestration.stages.context import Context
from moe_ray.run_directory import CAPTURE, IDENTIFY, PROMPTS, RISK
from moe_ray.storage.folder import Folder
from moe_ray.storage.stage import MADE, Outcome, Stage
from moe_ray.studies.trial import only_what_selects

logger = logging.getLogger(__name__)

MOST_EXPORT_BYTES = 64 * 10**6
"""The pickle for pandas users, which is made in memory several times over, is written up to this size of its masks."""


def identify(run: Context) -> Outcome:
    """Makes `masks`. Targets are among the inputs because the export for pandas users holds them."""
    inputs = {
        "counts": run.made(CAPTURE, "counts"),
        "targets": run.made(PROMPTS, "targets"),
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
    without_mask = np.setdiff1d(run.directory.stored_batches.columns("batch_idx")["batch_idx"], masks.batch_idx)
    return {
        "union_experts": len(masks.union_experts),
        "batches_without_mask": without_mask.tolist(),
        MADE: {"masks": masks.digest()},
    }


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
