"""Answers of the model under natural routing, and verdicts on them, for the stages that need them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import cache
from typing import Any

import pandas as pd

from moe_ray.config.auto import gpus_of, processes_of
from moe_ray.config.evaluate import EvaluateConfig
from moe_ray.models.loading import context_length, load_tokenizer
from moe_ray.orchestration.jobs.answer import answer
from moe_ray.orchestration.jobs.answer_job import AnswerJob
from moe_ray.orchestration.jobs.judge import LOCAL_MODELS, judge
from moe_ray.orchestration.stages.context import Context
from moe_ray.prompts.quarantine import Rejected
from moe_ray.routing.encode_example import TooLong, unanswerable
from moe_ray.storage.folder import Folder


def answered(
    run: Context,
    frame: pd.DataFrame,
    parts: str,
    what: str,
    *,
    max_new_tokens: int | None = None,
    adapter: str | None = None,
    after_thought: bool = False,
) -> pd.DataFrame:
    """Greedy answers of the base model, or of it with learned experts, one to each prompt, in the frame's order.

    They are for decisions and targets, which want the likeliest answer; what is measured is drawn as `evaluate` says.

    Args:
        run: the run.
        frame: held-out examples, see `answer_examples`.
        parts: folder of the run directory that gets the answers; examples whose answers it holds are not asked again.
        what: what this is, for the progress bar.
        max_new_tokens: None = `evaluate.max_new_tokens`.
        adapter: its folder of learned experts; None = the base model.
        after_thought: the model is asked for answers without a thought.
    """
    config: EvaluateConfig = replace(run.config.evaluate, temperature=0.0, samples=1)
    if max_new_tokens is not None:
        config = replace(config, max_new_tokens=max_new_tokens)
    job = AnswerJob(model=run.model, config=config, run_url=run.directory.folder.url, parts=parts, adapter=adapter)
    job = replace(job, after_thought=after_thought)
    return answer(frame, job, what=what, models=run.models).answers


def too_long_policy(run: Context) -> TooLong:
    """Of examples that are too long to be asked: what could be counted of one is no matter here."""
    return "error" if run.config.capture.too_long == "error" else "skip"


def unaskable_of(run: Context) -> Callable[[pd.DataFrame], dict[Any, Rejected]]:
    """A function that gives the rows that the model cannot be asked, each with the reason; see `unanswerable`."""
    tokenizer = cache(lambda: load_tokenizer(run.model))

    def unaskable(frame: pd.DataFrame) -> dict[Any, Rejected]:
        if frame.empty:
            return {}
        limit = context_length(run.model)
        return unanswerable(frame, tokenizer(), limit=limit, too_long=too_long_policy(run))

    return unaskable


def judged(run: Context, answers: pd.DataFrame, parts: Folder, what: str) -> pd.DataFrame:
    """The answers with verdicts; those that `parts` holds already are not asked for again."""
    config = run.config.evaluate
    if config.judge in LOCAL_MODELS:
        run.models.make_room(cpus=processes_of(config.num_actors), gpus=gpus_of(config.gpus_per_actor))
    elif config.judge == "endpoint":
        run.models.make_room(gpus=1)  # which may take hours, and nobody should pay for GPUs that wait
    return judge(answers, config, parts, what=what)
