"""Stage `finetune`: the learned experts, in one round or several."""

from __future__ import annotations

from typing import Any

from moe_ray.config.finetune import FinetuneConfig
from moe_ray.finetuning.adapter_files import adapter_digest
from moe_ray.orchestration.jobs.finetune import FinetuneJob
from moe_ray.orchestration.stages.context import Context
from moe_ray.orchestration.stages.identify import selecting_settings
from moe_ray.orchestration.stages.rounds import Rounds
from moe_ray.orchestration.stages.training import train
from moe_ray.run_directory import CAPTURE, FINETUNE, IDENTIFY, PROMPTS, round_folder
from moe_ray.storage.folder import Folder
from moe_ray.storage.stage import MADE, Outcome, Stage
from moe_ray.studies.kept_training import training_settings


def finetune(run: Context) -> Outcome:
    """Makes `experts`."""
    has_rounds = run.config.rounds.max_rounds > 1
    training = training_inputs(run)
    inputs = {"masks": run.made(IDENTIFY, "masks"), **training}
    if has_rounds:
        gpus = run.config.evaluate.gpus_per_actor
        inputs |= {
            **rounds_settings(run),
            **run.judged_answers(gpus, engine=run.config.evaluate.engine),
            "validation": run.made(PROMPTS, "validation"),
        }

    def work(folder: Folder) -> dict[str, Any]:
        job = FinetuneJob(
            model=run.model,
            config=_with_room(run),
            seed=run.config.seed,
            run_url=run.directory.folder.url,
            memory=_memory(run),
        )
        notes = Rounds(job, run, training).run() if has_rounds else train(run, job, inputs)
        return {**notes, MADE: {"experts": adapter_digest(folder)}}

    return run.do(Stage(name=FINETUNE, inputs=inputs, work=work, keeps=(round_folder("*").rpartition("/")[2],)))


def _with_room(run: Context) -> FinetuneConfig:
    """The settings of the training, which is refused where it has no room; with more GPUs, where it takes more."""
    if run.room is None:
        return run.config.finetune
    num_experts = len(run.directory.masks.union_experts)
    return run.room.to_train(run.config, num_experts, may_spread=run.asked.finetune.gpus_per_worker == "auto")


def _memory(run: Context) -> int:
    """Bytes that a training worker takes on the CPU; 0 = the machines were not looked at."""
    if run.room is None:
        return 0
    return run.room.of_worker(run.config, len(run.directory.masks.union_experts))


def training_inputs(run: Context) -> dict[str, Any]:
    """What learned experts depend on beside the masks.

    How many workers train, and how many rows or tokens at once, is not among it.
    """
    inputs = {**training_sources(run), **training_settings(run.config)}
    if run.config.finetune.patience:
        inputs["validation"] = run.made(PROMPTS, "validation")
    return inputs


def training_sources(run: Context) -> dict[str, Any]:
    """What learned experts depend on beside masks and settings, and the validation examples that `patience` watches."""
    return {
        "targets": run.made(PROMPTS, "targets"),
        "left_out": run.made(CAPTURE, "left_out"),
        **run.checkpoint,
        **run.numerics(0),
        "seed": run.config.seed,
    }


def rounds_settings(run: Context) -> dict[str, Any]:
    """The settings that decide how many rounds there are, and which masks and weights each of them starts from."""
    settings = {key: value for key, value in run.settings("weights").items() if key.startswith("rounds.")}
    if run.config.rounds.action == "identify":
        settings |= selecting_settings(run)
    return settings
