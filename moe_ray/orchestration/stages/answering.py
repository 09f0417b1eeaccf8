"""Answers of the model under natural routing, and verdicts on them, for the stages that need them."""

from __future__ import annotations

from dataclasses import replace

import pandas as pd

from moe_ray.config.evaluate import EvaluateConfig
from moe_ray.orchestration.jobs.answer import AnswerJob, answer
from moe_ray.orchestration.jobs.judge import judge
from moe_ray.orchestration.stages.context import Context
from moe_ray.storage.folder import Folder


def answered(
    run: Context,
    frame: pd.DataFrame,
    parts: str,
    what: str,
    *,
    max_new_tokens: int | None = None,
    adapter: str | None = None,
) -> pd.DataFrame:
    """Answers of the base model, or of it with learned experts, in the frame's order.

    Args:
        run: the run.
        frame: held-out examples, see `answer_examples`.
        parts: folder of the run directory that gets the answers; examples whose answers it holds are not asked again.
        what: what this is, for the progress bar.
        max_new_tokens: None = `evaluate.max_new_tokens`.
        adapter: its folder of learned experts; None = the base model.
    """
    config: EvaluateConfig = run.config.evaluate
    if max_new_tokens is not None:
        config = replace(config, max_new_tokens=max_new_tokens)
    job = AnswerJob(model=run.model, config=config, run_url=run.directory.folder.url, parts=parts, adapter=adapter)
    return answer(frame, job, what=what, models=run.models).answers


def judged(run: Context, answers: pd.DataFrame, parts: Folder, what: str) -> pd.DataFrame:
    """The answers with verdicts; those that `parts` holds already are not asked for again."""
    config = run.config.evaluate
    if config.judge == "classifier":
        run.models.make_room(cpus=config.num_actors + 1, gpus=config.gpus_per_actor)
    elif config.judge == "endpoint":
        run.models.make_room(gpus=1)  # which may take hours, and nobody should pay for GPUs that wait
    return judge(answers, config, parts, what=what)
