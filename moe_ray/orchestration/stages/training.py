"""A training that starts from the base model: done now, or taken from a trial of the run's sweep that was the same."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

from moe_ray.orchestration.jobs.finetune import FinetuneJob, finetune
from moe_ray.orchestration.stages.context import Context
from moe_ray.run_directory import SWEEP, TRIAL_FOLDERS, TRIALS
from moe_ray.studies.kept_training import take_training

logger = logging.getLogger(__name__)


def train(run: Context, job: FinetuneJob, inputs: Mapping[str, Any]) -> dict[str, Any]:
    """Puts learned experts and history in the job's folder; returns the numbers of `FineTuned`.

    Args:
        run: the run.
        job: of a training from the base model.
        inputs: everything the learned experts depend on: masks, and what `training_inputs` names.
    """
    if run.directory.holds(SWEEP, TRIALS):
        taken = take_training(run.directory.sub(f"{SWEEP}/{TRIAL_FOLDERS}"), inputs, job.folder())
        if taken is not None:
            logger.info("fine-tuning: taken from the sweep's trial %s, which trained the same", taken["trained_by"])
            return taken
    return finetune(job)
