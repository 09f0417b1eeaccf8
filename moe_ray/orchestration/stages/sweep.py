"""Stage `sweep`: the trials, ranked, and the winner's settings; captures nothing."""

from __future__ import annotations

from typing import Any

from moe_ray.orchestration.stages.context import Context
from moe_ray.orchestration.stages.finetune import training_sources
from moe_ray.orchestration.stages.identify import selecting_settings
from moe_ray.run_directory import CAPTURE, PROMPTS, SWEEP, TRIAL_FOLDERS
from moe_ray.storage.folder import Folder
from moe_ray.storage.stage import Outcome, Stage
from moe_ray.studies.kept_training import training_settings
from moe_ray.studies.search_space import read_space


def sweep(run: Context) -> Outcome:
    """The trials of the sweep, ranked, with the winner's settings among the notes.

    Trials are stages of their own: a wider space, another objective or another bound trains no finished trial again.
    """
    search = {key: value for key, value in run.settings("search").items() if key.startswith("sweep.")}
    del search["sweep.run"]
    shared = {
        "counts": run.made(CAPTURE, "counts"),
        "left_out": run.made(CAPTURE, "left_out"),
        "targets": run.made(PROMPTS, "targets"),
        "validation": run.made(PROMPTS, "validation"),
        **run.measurement(),
        "seed": run.config.seed,
    }
    searched = read_space(run.config).settings
    settings = {**selecting_settings(run), **training_settings(run.config)}
    inputs = {
        **shared,
        **search,
        # What is searched has another value in every trial.
        **{key: value for key, value in settings.items() if key not in searched},
    }

    def work(folder: Folder) -> dict[str, Any]:
        # Ray Tune takes a second to import, and most runs do not sweep.
        from moe_ray.orchestration.jobs.sweep import sweep as run_trials
        from moe_ray.orchestration.jobs.sweep import write_results
        from moe_ray.orchestration.jobs.sweep_job import SweepJob

        run.models.release()  # trials hold models of their own
        job = SweepJob(
            model=run.model,
            config=run.config,
            run_url=run.directory.folder.url,
            inputs=shared,
            sources=training_sources(run),
            neutral_texts=run.prompts.neutral,
            memory=run.models.memory,
        )
        return write_results(folder, run.asked, run_trials(job))

    return run.do(Stage(name=SWEEP, inputs=inputs, work=work, keeps=(TRIAL_FOLDERS,)))
