"""Tasks of harnesses on model processes: one call per task and model, which writes the scores of every sample."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

from moe_ray.config.auto import gpus_of, processes_of
from moe_ray.config.evaluate import EvaluateConfig
from moe_ray.config.harness import HarnessConfig
from moe_ray.config.model import ModelConfig
from moe_ray.harness.inspect_tasks import inspect_scores
from moe_ray.harness.lm_eval_tasks import lm_eval_scores
from moe_ray.harness.tasks import HarnessTask
from moe_ray.orchestration.cluster.model_actor import ModelWork
from moe_ray.orchestration.cluster.model_pool import ModelPool, pool_for
from moe_ray.orchestration.cluster.progress import progress
from moe_ray.routing.capture import evaluating
from moe_ray.storage.folder import Folder

SCORES = "scores.parquet"
SAMPLES = "samples.jsonl"
"""Of lm-eval: a line per sample."""
LOG = "samples.eval"
"""Of inspect_ai: its own log."""


@dataclass(frozen=True, kw_only=True)
class HarnessJob:
    """What every actor needs to know; plain values.

    Attributes:
        model: which model.
        config: of the harnesses.
        run_url: the run directory.
        when: `before` or `after` the repair.
        adapter: its folder of learned experts; None = the base model.
        folders: by task, its folder that gets the scores.
    """

    model: ModelConfig
    config: HarnessConfig
    run_url: str
    when: str
    adapter: str | None
    folders: Mapping[str, str]


class HarnessActor(ModelWork):
    """Runs one task; returns its folder."""

    job: HarnessJob

    @contextmanager
    def in_force(self) -> Iterator[None]:
        """The learned experts are in the model, where the job has some."""
        adapter = self.job.adapter
        with self.holder.with_adapter(None if adapter is None else Folder.open(self.job.run_url).sub(adapter)):
            yield

    def __call__(self, block: HarnessTask) -> str:
        """Does one task."""
        job, holder = self.job, self.holder
        place = job.folders[block.folder]
        folder = Folder.open(job.run_url).sub(place)
        with evaluating(holder.model):
            if block.harness == "lm_eval":
                scores, samples = lm_eval_scores(holder.model, holder.tokenizer, block, job.config)
                lines = [json.dumps(sample, ensure_ascii=False) for sample in samples]
                folder.write_bytes(SAMPLES, "".join(f"{line}\n" for line in lines).encode())
            else:
                scores, log = inspect_scores(holder.model, holder.tokenizer, block, job.config, name=job.when)
                folder.write_bytes(LOG, log)
        # The scores come last: with them the task is done.
        folder.write_table(SCORES, scores)
        return block.folder


def run_tasks(
    tasks: Sequence[HarnessTask], job: HarnessJob, evaluate: EvaluateConfig, *, models: ModelPool | None = None
) -> Iterator[str]:
    """Yields the folder's name of each task as it is done.

    Args:
        tasks: what is to be run.
        job: model and folders.
        evaluate: how many processes, with which GPUs.
        models: the processes; None = some for this job alone.

    Raises:
        InputError: a task cannot be run.
    """
    with pool_for(job.model, models) as pool:
        work = pool.working(
            *(tasks, HarnessActor, job),
            what="harness",
            num_processes=min(processes_of(evaluate.num_actors), len(tasks)),
            gpus=gpus_of(evaluate.gpus_per_actor),
        )
        with work as results, progress(f"harness, {job.when}", len(tasks)) as meter:
            for folder in results:
                meter.advance()
                yield folder
