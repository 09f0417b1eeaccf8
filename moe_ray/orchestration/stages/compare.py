"""Stage `compare`: per-batch masks against the baselines, trained and measured alike on the held-out examples.

Each arm is a stage of its own, so that asking for one more baseline runs only that one.
"""

from __future__ import annotations

import pandas as pd

from moe_ray.orchestration.jobs.compare import CompareJob, run_arms
from moe_ray.orchestration.stages.context import Context
from moe_ray.report.study_text import verdict
from moe_ray.run_directory import CAPTURE, COMPARE, COMPARISON, PROMPTS, VERDICT
from moe_ray.studies.baselines import plan_arms
from moe_ray.studies.comparison import comparison_table


def compare(run: Context) -> pd.DataFrame:
    """The table of the comparison, a row per arm."""
    masks = run.directory.masks
    job = CompareJob(
        model=run.model,
        evaluate=run.config.evaluate,
        seed=run.config.seed,
        run_url=run.directory.folder.url,
        trained_batches=masks.trained_batches,
        num_actors=run.config.compare.max_concurrent,
        gpus_per_actor=run.config.finetune.gpus_per_worker,
        neutral_texts=run.prompts.neutral,
    )
    measured = {"test": run.made(PROMPTS, "test"), **run.measurement()}
    trained = {
        "targets": run.made(PROMPTS, "targets"),
        "left_out": run.made(CAPTURE, "left_out"),
        "trained_batches": list(masks.trained_batches),
        "seed": run.config.seed,
    }
    folder = run.directory.sub(COMPARE)
    arms = plan_arms(masks, run.directory.risk, run.config.finetune, run.config.compare)
    run.models.release()  # arms hold models of their own
    table = comparison_table(run_arms(job, arms, folder, measured=measured, trained=trained))
    folder.write_table(COMPARISON, table)
    folder.write_json(VERDICT, verdict(table))
    return table
