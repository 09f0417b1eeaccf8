"""Stage `finetune`: the learned experts, in one round or several."""

from __future__ import annotations

from typing import Any

from moe_ray.finetuning.adapter_files import adapter_digest
from moe_ray.orchestration.jobs.finetune import FinetuneJob
from moe_ray.orchestration.jobs.finetune import finetune as train
from moe_ray.orchestration.stages.context import Context
from moe_ray.orchestration.stages.rounds import Rounds
from moe_ray.run_directory import CAPTURE, FINETUNE, IDENTIFY, PROMPTS
from moe_ray.storage.folder import Folder
from moe_ray.storage.stage import MADE, Outcome, Stage


def finetune(run: Context) -> Outcome:
    """Makes `experts`."""
    has_rounds = run.config.rounds.max_rounds > 1
    inputs = training_inputs(run)
    if has_rounds:
        inputs |= {**run.settings("masks"), **run.measurement(), "validation": run.made(PROMPTS, "validation")}
    elif run.config.finetune.patience:
        inputs["validation"] = run.made(PROMPTS, "validation")

    def work(folder: Folder) -> dict[str, Any]:
        job = FinetuneJob(
            model=run.model, config=run.config.finetune, seed=run.config.seed, run_url=run.directory.folder.url
        )
        notes = Rounds(job, run, inputs).run() if has_rounds else train(job)
        return {**notes, MADE: {"experts": adapter_digest(folder)}}

    return run.do(Stage(name=FINETUNE, inputs=inputs, work=work))


def training_inputs(run: Context) -> dict[str, Any]:
    """What the learned experts depend on; not on how many workers train them, nor how many rows or tokens at once.

    With `finetune.batches_per_step=0` a step takes as many batches as there are workers, which does matter.
    """
    settings = run.settings("weights")
    if run.config.rounds.max_rounds == 1:
        settings = {key: value for key, value in settings.items() if not key.startswith("rounds.")}
    config = run.config.finetune
    settings["finetune.batches_per_step"] = config.batches_per_step or max(1, config.num_workers)
    return {
        "masks": run.made(IDENTIFY, "masks"),
        "targets": run.made(PROMPTS, "targets"),
        "left_out": run.made(CAPTURE, "left_out"),
        **run.checkpoint,
        "model.dtype": run.model.dtype,
        **settings,
        "seed": run.config.seed,
    }
