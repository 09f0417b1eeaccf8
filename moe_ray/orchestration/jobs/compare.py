"""Baselines on a cluster: actors that each hold one model train and measure one arm after another.

Every arm has a folder with a manifest, so a comparison that was killed, or that is asked for another baseline, runs only
what is missing.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import ray

from moe_ray.config.effects import settings_affecting
from moe_ray.config.evaluate import EvaluateConfig
from moe_ray.config.finetune import FinetuneConfig
from moe_ray.config.model import ModelConfig
from moe_ray.config.run import Config
from moe_ray.identification.mask_files import write_masks
from moe_ray.orchestration.cluster.model_process import BaseModel
from moe_ray.orchestration.cluster.node_share import processes_on_this_node
from moe_ray.orchestration.cluster.progress import progress
from moe_ray.orchestration.cluster.ray_session import require_cpus, result_of
from moe_ray.prompts.example_tables import frame_to_batches
from moe_ray.report.format import decimal, rate
from moe_ray.run_directory import ANSWERS, RunDirectory
from moe_ray.storage.folder import Folder
from moe_ray.storage.stage import begin, finish, read_outcome
from moe_ray.studies.baselines import Arm
from moe_ray.studies.comparison import BASE, ArmResult
from moe_ray.studies.measured import Measured
from moe_ray.studies.trial import in_one_process, measurer, run_full_trial, run_trial

logger = logging.getLogger(__name__)

_NEUTRAL, _LOSSES = "neutral.parquet", "losses.json"
BASE_ARM = Arm(name=BASE, kind=BASE, masks=None, train=FinetuneConfig())


@dataclass(frozen=True, kw_only=True)
class CompareJob:
    """What every arm needs to know; plain values."""

    model: ModelConfig
    evaluate: EvaluateConfig
    seed: int
    run_url: str
    trained_batches: tuple[int, ...]
    num_actors: int
    gpus_per_actor: float
    neutral_texts: tuple[str, ...] = ()


def run_arms(
    job: CompareJob,
    arms: Sequence[Arm],
    folder: Folder,
    *,
    measured: Mapping[str, Any],
    trained: Mapping[str, Any],
) -> list[ArmResult]:
    """The results of all arms, in order; those that were finished before with equal inputs are read, not run.

    Args:
        job: what arms need.
        arms: from `plan_arms`.
        folder: of the comparison; each arm gets a folder in it.
        measured: what the measurements of all arms depend on.
        trained: what the training of all arms but the base model depends on, as well.
    """
    every = [BASE_ARM, *arms]
    depends = {arm.name: _inputs_of(arm, measured, trained) for arm in every}
    missing = [arm for arm in every if begin(folder.sub(arm.name), depends[arm.name]).action != "reuse"]
    if len(missing) < len(every):
        logger.info("compare: %d of %d arms reused from an earlier run", len(every) - len(missing), len(every))
    if missing:
        _run_missing(job, missing, folder, depends)
    return [_read_arm(arm, folder.sub(arm.name)) for arm in every]


def _inputs_of(arm: Arm, measured: Mapping[str, Any], trained: Mapping[str, Any]) -> dict[str, Any]:
    if arm.kind == BASE:
        return {**measured, "kind": arm.kind}
    settings = settings_affecting(Config(finetune=in_one_process(arm.train)), "weights")
    return {
        **measured,
        **trained,
        "kind": arm.kind,
        "masks": None if arm.masks is None else arm.masks.digest(),
        **{key: value for key, value in settings.items() if key.startswith("finetune.")},
    }


def _run_missing(job: CompareJob, arms: Sequence[Arm], folder: Folder, depends: Mapping[str, Any]) -> None:
    num_actors = min(job.num_actors, len(arms))
    require_cpus(num_actors, "the comparison")
    kind = ray.remote(num_cpus=1, num_gpus=job.gpus_per_actor, scheduling_strategy="SPREAD")(_ArmActor)
    idle = [kind.remote(job) for _ in range(num_actors)]
    waiting = list(arms)
    running: dict[Any, tuple[Any, Arm]] = {}
    try:
        with progress("compare", len(arms)) as meter:
            while waiting or running:
                while waiting and idle:
                    actor, arm = idle.pop(), waiting.pop(0)
                    running[actor.run.remote(arm)] = (actor, arm)
                (done,), _ = ray.wait(list(running), num_returns=1)
                actor, arm = running.pop(done)
                idle.append(actor)
                _write_arm(arm, result_of(done), folder.sub(arm.name), depends[arm.name])
                meter.advance()
    finally:
        for actor in [*idle, *(actor for actor, _ in running.values())]:
            ray.kill(actor)


class _ArmActor:
    """Trains and measures arms on one base model."""

    def __init__(self, job: CompareJob) -> None:
        self.base = BaseModel(job.model, processes_on_this_node(job.num_actors))
        run = RunDirectory.open(job.run_url)
        self.job = job
        self.batches = frame_to_batches(run.training_examples)
        self.measure = measurer(self.base.model, self.base.tokenizer, run.test, job.evaluate, job.neutral_texts)

    def run(self, arm: Arm) -> tuple[Measured, dict[str, Any]]:
        """An arm's measurements, and what its training was."""
        if arm.kind == BASE:
            return self.measure(), {"trainable_parameters": 0, "train_seconds": 0.0, "losses": []}
        self.base.check()
        model, tokenizer, seed = self.base.model, self.base.tokenizer, self.job.seed
        if arm.masks is None:
            outcome = run_full_trial(
                model,
                tokenizer,
                self.batches,
                only=self.job.trained_batches,
                config=arm.train,
                seed=seed,
                measure=self.measure,
            )
        else:
            # What comes through Ray's object store cannot be written to, which torch warns of.
            masks = replace(arm.masks, masks_BLE=arm.masks.masks_BLE.copy())
            outcome = run_trial(
                model, tokenizer, self.batches, masks, config=arm.train, seed=seed, measure=self.measure
            )
        return outcome.measured, {
            "trainable_parameters": outcome.trainable_parameters,
            "frozen_parameters_changed": outcome.frozen_parameters_changed,
            "train_seconds": round(outcome.train_seconds, 2),
            "evaluate_seconds": round(outcome.evaluate_seconds, 2),
            "losses": list(outcome.losses),
        }


def _write_arm(arm: Arm, outcome: tuple[Measured, dict[str, Any]], folder: Folder, depends: Mapping[str, Any]) -> None:
    measured, notes = outcome
    folder.write_table(ANSWERS, measured.answers)
    if measured.neutral is not None:
        folder.write_table(_NEUTRAL, measured.neutral)
    if arm.masks is not None:
        write_masks(folder, arm.masks)
    folder.write_json(_LOSSES, notes.pop("losses"))
    finish(folder, depends, notes, seconds=round(notes["train_seconds"] + notes.get("evaluate_seconds", 0.0), 2))
    refused = measured.answers.groupby("label")["refused"].mean()
    logger.info(
        "compare: %s: unsafe refused %s, safe refused %s, trained in %s s",
        arm.name, rate(refused["unsafe"]), rate(refused["safe"]), decimal(notes["train_seconds"], 1),
    )  # fmt: skip


def _read_arm(arm: Arm, folder: Folder) -> ArmResult:
    notes = read_outcome(folder).notes
    sizes = [] if arm.masks is None else [len(arm.masks.selected[batch]) for batch in arm.masks.trained_batches]
    neutral = folder.read_frame(_NEUTRAL) if folder.exists(_NEUTRAL) else None
    return ArmResult(
        name=arm.name,
        measured=Measured(answers=folder.read_frame(ANSWERS), neutral=neutral),
        experts_per_batch=float(np.mean(sizes)) if sizes else None,
        trainable_parameters=notes["trainable_parameters"],
        train_seconds=notes["train_seconds"],
    )
