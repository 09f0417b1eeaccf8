"""Stage `harness`: tasks of lm-eval and inspect_ai on both models, and what the repair changed, sample by sample.

Every task on either model is kept under what it depends on: the task's version and files, and the learned experts. So
another task runs that one only, and another repair leaves what the base model scored.
"""

from __future__ import annotations

import time
from typing import Any

from moe_ray.harness.scores import harness_figures
from moe_ray.harness.tasks import HarnessTask, tasks_of
from moe_ray.orchestration.jobs.harness import SCORES, HarnessJob, run_tasks
from moe_ray.orchestration.stages.context import Context
from moe_ray.run_directory import FINETUNE, HARNESS, WHENS, When
from moe_ray.storage.fingerprint import content_hash, frame_hash
from moe_ray.storage.folder import Folder
from moe_ray.storage.stage import MADE, Outcome, Stage, begin, finish


def harness(run: Context) -> Outcome:
    """Scores of both models on every task; makes `scores`."""
    tasks = tasks_of(run.config.harness)
    inputs = {
        "tasks": [[task.harness, task.name, task.version()] for task in tasks],
        **{f"{when}": _inputs(run, None, when) for when in WHENS},
    }
    # What each task made has inputs of its own, so nothing in the folder is emptied.
    return run.do(Stage(name=HARNESS, inputs=inputs, work=lambda folder: _harness(run, folder, tasks), keeps=("*",)))


def _inputs(run: Context, task: HarnessTask | None, when: When) -> dict[str, Any]:
    return {
        "task": None if task is None else [task.harness, task.name, task.version()],
        "experts": run.made(FINETUNE, "experts") if when == "after" else None,
        **run.settings("harness"),
        **run.checkpoint,
        **run.numerics(run.config.evaluate.gpus_per_actor),
    }


def _harness(run: Context, folder: Folder, tasks: list[HarnessTask]) -> dict[str, Any]:
    for when in WHENS:
        _run_missing(run, folder, tasks, when)
    rows = []
    for task in tasks:
        before, after = (folder.sub(f"{task.folder}/{when}").read_frame(SCORES) for when in WHENS)
        rows += [{"harness": task.harness} | row for row in harness_figures(before, after)]
    scores = [frame_hash(folder.sub(f"{task.folder}/{when}").read_frame(SCORES)) for task in tasks for when in WHENS]
    return {
        "figures": rows,
        "versions": {task.title: task.version()["package"] for task in tasks},
        MADE: {"scores": content_hash(scores)},
    }


def _run_missing(run: Context, folder: Folder, tasks: list[HarnessTask], when: When) -> None:
    todo = {}
    for task in tasks:
        inputs = _inputs(run, task, when)
        if begin(folder.sub(f"{task.folder}/{when}"), inputs).action != "reuse":
            todo[task.folder] = (task, inputs)
    if not todo:
        return
    job = HarnessJob(
        model=run.model,
        config=run.config.harness,
        run_url=run.directory.folder.url,
        when=when,
        adapter=FINETUNE if when == "after" else None,
        folders={name: f"{HARNESS}/{name}/{when}" for name in todo},
    )
    began = time.perf_counter()
    tasks_left = [task for task, _ in todo.values()]
    for name in run_tasks(tasks_left, job, run.config.evaluate, models=run.models):
        finish(folder.sub(f"{name}/{when}"), todo[name][1], {}, seconds=round(time.perf_counter() - began, 2))
