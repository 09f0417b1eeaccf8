"""Stage `finetune`: the learned experts, in one round or several."""

from __future__ import annotations

from typing import Any

from moe_ray.finetuning.adapter_files import adapter_digest
from moe_ray.orchestration.jobs.finetune import FinetuneJob
from moe_ray.orchestration.jobs.finetune import finetune as train
from moe_ray.orchestration.stages.context import Context
from moe_ray.orchestration.stages.identify import selecting_settings
from moe_ray.orchestration.stages.rounds import Rounds
from moe_ray.run_directory import CAPTURE, FINETUNE, IDENTIFY, PROMPTS, round_folder
from moe_ray.storage.folder import Folder
from moe_ray.storage.stage import MADE, Outcome, Stage


def finetune(run: Context) -> Outcome:
    """Makes `experts`."""
    has_rounds = run.config.rounds.max_rounds > 1
    training = training_inputs(run)
    inputs = {"masks": run.made(IDENTIFY, "masks"), **training}
    if has_rounds:
        gpus = run.config.evaluate.gpus_per_actor
        inputs |= {**rounds_settings(run), **run.judged_answers(gpus), "validation": run.made(PROMPTS, "validation")}

    def work(folder: Folder) -> dict[str, Any]:
        job = FinetuneJob(
            model=run.model, config=run.config.finetune, seed=run.config.seed, run_url=run.directory.folder.url
        )
        notes = Rounds(job, run, training).run() if has_rounds else train(job, run.models)
        return {**notes, MADE: {"experts": adapter_digest(folder)}}

    return run.do(Stage(name=FINETUNE, inputs=inputs, work=work, keeps=(round_folder("*").rpartition("/")[2],)))


def training_inputs(run: Context) -> dict[str, Any]:
    """What learned experts depend on beside the masks.

    How many workers train, and how many rows or tokens at once, is not among it.
    """
    inputs = {
        "targets": run.made(PROMPTS, "targets"),
        "left_out": run.made(CAPTURE, "left_out"),
        **run.checkpoint,
        **run.numerics(0),
        **training_settings(run),
        "seed": run.config.seed,
    }
    if run.config.finetune.patience:
        inputs["validation"] = run.made(PROMPTS, "validation")
    return inputs


def training_settings(run: Context) -> dict[str, Any]:
    """The settings `finetune.*` that affect the weights.

    With `finetune.batches_per_step=0` a step takes as many batches as there are workers, which does matter.
    """
    settings = {key: value for key, value in run.settings("weights").items() if not key.startswith("rounds.")}
    config = run.config.finetune
    return settings | {"finetune.batches_per_step": config.batches_per_step or max(1, config.num_workers)}


def rounds_settings(run: Context) -> dict[str, Any]:
    """The settings that decide how many rounds there are, and which masks and weights each of them starts from."""
    settings = {key: value for key, value in run.settings("weights").items() if key.startswith("rounds.")}
    if run.config.rounds.action == "identify":
        settings |= selecting_settings(run)
    return settings
