"""Stage `sweep`: the trials, ranked, and the winner's settings; captures nothing."""

from __future__ import annotations

from typing import Any

from moe_ray.orchestration.jobs.sweep import sweep as run_trials
from moe_ray.orchestration.jobs.sweep import write_results
from moe_ray.orchestration.jobs.sweep_trial import SweepJob
from moe_ray.orchestration.stages.context import Context
from moe_ray.run_directory import CAPTURE, PROMPTS, SWEEP
from moe_ray.storage.folder import Folder
from moe_ray.storage.stage import Outcome, Stage


def sweep(run: Context) -> Outcome:
    """The trials of the sweep, ranked, with the winner's settings among the notes."""
    search = {key: value for key, value in run.settings("search").items() if key.startswith("sweep.")}
    del search["sweep.run"]
    inputs = {
        "counts": run.made(CAPTURE, "counts"),
        "left_out": run.made(CAPTURE, "left_out"),
        "targets": run.made(PROMPTS, "targets"),
        "validation": run.made(PROMPTS, "validation"),
        **run.checkpoint,
        **search,
        **run.settings("masks", "weights"),
        **run.measurement(),
        "seed": run.config.seed,
    }

    def work(folder: Folder) -> dict[str, Any]:
        job = SweepJob(
            model=run.model,
            config=run.config,
            run_url=run.directory.folder.url,
            inputs=inputs,
            neutral_texts=run.prompts.neutral,
        )
        return write_results(folder, run.config, run_trials(job))

    return run.do(Stage(name=SWEEP, inputs=inputs, work=work))
