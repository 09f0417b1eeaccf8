"""Answers by an engine: it generates, and the model processes then score and count the same rows with these answers.

So losses, routing counts and first tokens are measured by transformers, whoever generated; only what costs a pass for every
token is the engine's.
"""

from __future__ import annotations

import json
import math
from typing import Any

import numpy as np
import pandas as pd

from moe_ray.config.auto import gpus_of, processes_of
from moe_ray.evaluation.generated import without_generated, write_generated
from moe_ray.evaluation.samples import seeds_of
from moe_ray.models.tokenization import encode_prompt
from moe_ray.orchestration.cluster.engine_process import EngineHolder, engine_pool
from moe_ray.orchestration.cluster.model_actor import ModelWork
from moe_ray.orchestration.cluster.model_pool import ModelPool
from moe_ray.orchestration.cluster.progress import progress
from moe_ray.orchestration.jobs.answer_job import AnswerJob, as_table, blocks_of
from moe_ray.storage.folder import Folder

_ROWS_PER_BLOCK = 1024
"""That an engine gets at once: enough for it to batch by itself, few enough to lose."""


class EngineAnswerActor(ModelWork):
    """Generates answers to prompts; writes them as a part."""

    holder: EngineHolder
    job: AnswerJob

    def __call__(self, batch: dict[str, np.ndarray[Any, Any]]) -> int:
        """Answers one block of rows; returns how many."""
        rows, config, tokenizer = pd.DataFrame(batch), self.job.config, self.holder.tokenizer
        prompts = [
            encode_prompt(tokenizer, json.loads(text), after_thought=self.job.after_thought)
            for text in rows["messages"]
        ]
        answers = self.holder.respond(
            prompts,
            max_new_tokens=config.max_new_tokens,
            temperature=config.temperature,
            seeds=seeds_of(rows, config.sample_seed),
        )
        write_generated(Folder.open(self.job.run_url).sub(self.job.parts), rows, answers)
        return len(rows)


def generate_by_engine(rows: pd.DataFrame, job: AnswerJob, *, what: str, models: ModelPool | None) -> None:
    """Has engines answer the rows under natural routing; what `job.parts` holds already is not generated again.

    Args:
        rows: of `rows_to_answer`, with plain texts or without.
        job: model, sizes, folders.
        what: what this is, for the progress bar.
        models: the run's processes, which give way meanwhile; None = there are none.
    """
    folder, config = Folder.open(job.run_url), job.config
    todo = without_generated(rows[rows["routing"] == "natural"], folder.sub(job.parts))
    if not len(todo):
        return
    gpus, number = gpus_of(config.gpus_per_actor), processes_of(config.num_actors)
    adapter = None if job.adapter is None else folder.sub(job.adapter)
    pool = engine_pool(job.model, models, gpus=gpus, adapter=adapter)
    blocks = blocks_of(as_table(todo), min(_ROWS_PER_BLOCK, math.ceil(len(todo) / number)))
    with (
        pool,
        pool.working(blocks, EngineAnswerActor, job, what=what, num_processes=number, gpus=gpus) as results,
        progress(f"{what}, generated", len(todo)) as meter,
    ):
        for done in results:
            meter.advance(done)
