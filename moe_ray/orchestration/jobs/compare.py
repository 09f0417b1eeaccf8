"""Baselines on a cluster: actors that each hold one model train and measure one arm after another.

Every arm has a folder for each seed, with a manifest, so a comparison that was killed, or that is asked for another baseline
or another seed, runs only what is missing.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np
import pandas as pd

from moe_ray.config.effects import settings_affecting
from moe_ray.config.evaluate import EvaluateConfig
from moe_ray.config.model import ModelConfig
from moe_ray.config.run import Config
from moe_ray.experts import Mask
from moe_ray.identification.mask_files import write_masks
from moe_ray.orchestration.cluster.actor_pool import in_actors
from moe_ray.orchestration.cluster.model_process import BaseModel
from moe_ray.orchestration.cluster.node_share import processes_on_this_node
from moe_ray.orchestration.cluster.placement import ANYWHERE, Placement
from moe_ray.orchestration.cluster.progress import progress
from moe_ray.prompts.example_tables import frame_to_batches
from moe_ray.report.format import decimal, rate
from moe_ray.run_directory import ANSWERS, RunDirectory
from moe_ray.storage.fingerprint import content_hash
from moe_ray.storage.folder import Folder
from moe_ray.storage.stage import begin, finish, read_outcome
from moe_ray.studies.baselines import BASE_ARM, Arm
from moe_ray.studies.comparison import ArmResult
from moe_ray.studies.measured import Measured
from moe_ray.studies.run_arm import ArmOutcome, Trainer
from moe_ray.studies.trial import in_one_process, measurer

logger = logging.getLogger(__name__)

_NEUTRAL, _LOSSES = "neutral.parquet", "losses.json"


@dataclass(frozen=True, kw_only=True)
class CompareJob:
    """What every arm needs to know; plain values.

    Attributes:
        model: the base model.
        evaluate: how it is measured.
        seed: of the first training of every arm; the others' follow.
        num_seeds: trainings of every arm.
        shares: of an arm's steps after which it is measured.
        run_url: the run directory.
        union_LE: (L, E) union of the per-batch masks that train.
        trained_batches: of the arms without a mask.
        num_actors: processes, each with a model.
        gpus_per_actor: of one process.
        neutral_texts: whose loss shows what was forgotten.
        memory: bytes of the weights in a process on the CPU, which Ray is asked for; 0 = nothing is asked for.
        placement: on which nodes.
    """

    model: ModelConfig
    evaluate: EvaluateConfig
    seed: int
    num_seeds: int
    shares: tuple[float, ...]
    run_url: str
    union_LE: Mask
    trained_batches: tuple[int, ...]
    num_actors: int
    gpus_per_actor: float
    neutral_texts: tuple[str, ...] = ()
    memory: int = 0
    placement: Placement = ANYWHERE


class _Training(NamedTuple):
    """An arm under one seed."""

    arm: Arm
    seed: int

    @property
    def folder(self) -> str:
        return f"{self.arm.folder}/seed_{self.seed}"


def run_arms(
    job: CompareJob,
    arms: Sequence[Arm],
    folder: Folder,
    *,
    measured: Mapping[str, Any],
    trained: Mapping[str, Any],
) -> list[ArmResult]:
    """The results of the base model and of all arms, in order; what was finished with equal inputs is read, not run.

    Args:
        job: what arms need.
        arms: from `plan_arms` and `plan_transfer`.
        folder: of the comparison; each arm gets a folder in it.
        measured: what the measurements of all arms depend on.
        trained: what the training of all arms depends on, as well.
    """
    every = [training for arm in (BASE_ARM, *arms) for training in _trainings(arm, job)]
    depends = {training.folder: _inputs_of(training, job, measured, trained) for training in every}
    missing = [
        training for training in every if begin(folder.sub(training.folder), depends[training.folder]).action != "reuse"
    ]
    if len(missing) < len(every):
        logger.info("compare: %d of %d trainings reused from an earlier run", len(every) - len(missing), len(every))
    if missing:
        _run_missing(job, missing, folder, depends)
    return [_read_arm(arm, [folder.sub(of.folder) for of in _trainings(arm, job)]) for arm in (BASE_ARM, *arms)]


def _trainings(arm: Arm, job: CompareJob) -> list[_Training]:
    """The arm under every seed; under one alone where nothing is trained."""
    number = 1 if arm.learns == "nothing" else job.num_seeds
    return [_Training(arm, job.seed + seed) for seed in range(number)]


def _inputs_of(
    training: _Training, job: CompareJob, measured: Mapping[str, Any], trained: Mapping[str, Any]
) -> dict[str, Any]:
    arm = training.arm
    masks = None if arm.masks is None else arm.masks.digest()
    known = {**measured, "kind": arm.kind, "shares": list(job.shares)}
    if arm.learns == "nothing":
        return {**known, "masks": masks}
    settings = settings_affecting(Config(finetune=in_one_process(arm.train)), "weights")
    return {
        **known,
        **trained,
        "trained_batches": list(job.trained_batches if arm.masks is None else arm.masks.trained_batches),
        "seed": training.seed,
        "masks": masks,
        "learns": arm.learns,
        "rank": arm.rank,
        # An arm that is made for a number of parameters finds out from the union how many these are.
        "budget": content_hash(np.packbits(job.union_LE).tolist()) if arm.is_matched else None,
        **{key: value for key, value in settings.items() if key.startswith("finetune.")},
    }


def _run_missing(job: CompareJob, missing: Sequence[_Training], folder: Folder, depends: Mapping[str, Any]) -> None:
    named = {training.folder: training for training in missing}
    work = in_actors(
        missing,
        _Arms,
        (job,),
        what="compare",
        num_actors=job.num_actors,
        gpus_per_actor=job.gpus_per_actor,
        memory=job.memory,
        placement=job.placement,
    )
    with work as outcomes, progress("compare", len(missing)) as meter:
        for name, outcome in outcomes:
            _write_arm(named[name], outcome, folder.sub(name), depends[name])
            meter.advance()


class _Arms:
    """Trains and measures arms on one base model."""

    def __init__(self, job: CompareJob) -> None:
        self.base = BaseModel(job.model, processes_on_this_node(job.num_actors))
        run = RunDirectory.open(job.run_url)
        model, tokenizer = self.base.model, self.base.tokenizer
        self.trainer = Trainer(
            model=model,
            tokenizer=tokenizer,
            batches=frame_to_batches(run.training_examples),
            test=run.test,
            evaluate=job.evaluate,
            measure=measurer(model, tokenizer, run.test, job.evaluate, job.neutral_texts),
            shares=job.shares,
            union_LE=job.union_LE,
            trained_batches=job.trained_batches,
        )

    def __call__(self, training: _Training) -> tuple[str, ArmOutcome]:
        """The training's folder, and what its arm gives under its seed."""
        arm, name = training.arm, training.folder
        self.base.check()
        if arm.masks is not None:
            # What comes through Ray's object store cannot be written to, which torch warns of.
            arm = replace(arm, masks=replace(arm.masks, masks_BLE=arm.masks.masks_BLE.copy()))
        return name, self.trainer.run(arm, seed=training.seed)


def _write_arm(training: _Training, outcome: ArmOutcome, folder: Folder, depends: Mapping[str, Any]) -> None:
    arm = training.arm
    folder.write_table(ANSWERS, _stacked({share: each.answers for share, each in outcome.measured.items()}))
    neutral = {share: each.neutral for share, each in outcome.measured.items() if each.neutral is not None}
    if neutral:
        folder.write_table(_NEUTRAL, _stacked(neutral))
    if arm.masks is not None:
        write_masks(folder, arm.masks)
    folder.write_json(_LOSSES, list(outcome.losses))
    notes = {
        "steps": {str(share): step for share, step in outcome.steps.items()},
        "trainable_parameters": outcome.trainable_parameters,
        "rank": outcome.rank,
        "train_seconds": round(outcome.train_seconds, 2),
        "evaluate_seconds": round(outcome.evaluate_seconds, 2),
    }
    finish(folder, depends, notes, seconds=round(outcome.train_seconds + outcome.evaluate_seconds, 2))
    last = outcome.measured[max(outcome.measured)].answers
    refused = last.groupby("label")["refused"].mean()
    logger.info(
        "compare: %s, seed %d: unsafe refused %s, safe refused %s, trained in %s s",
        arm.name, training.seed, rate(refused.get("unsafe")), rate(refused.get("safe")), decimal(outcome.train_seconds, 1),
    )  # fmt: skip


def _stacked(frames: Mapping[float, pd.DataFrame]) -> pd.DataFrame:
    """The tables of all shares in one, with `share`."""
    return pd.concat([frame.assign(share=share) for share, frame in frames.items()], ignore_index=True)


def _read_arm(arm: Arm, folders: Sequence[Folder]) -> ArmResult:
    notes = [read_outcome(folder).notes for folder in folders]
    steps = {float(share): int(step) for share, step in notes[0]["steps"].items()}
    sizes = [] if arm.masks is None else [len(arm.masks.selected[batch]) for batch in arm.masks.trained_batches]
    return ArmResult(
        name=arm.name,
        measured=[_read_measured(folder, list(steps)) for folder in folders],
        steps=steps,
        experts_per_batch=float(np.mean(sizes)) if sizes else None,
        trainable_parameters=notes[0]["trainable_parameters"],
        train_seconds=float(np.mean([note["train_seconds"] for note in notes])),
        rank=notes[0]["rank"],
    )


def _read_measured(folder: Folder, shares: Sequence[float]) -> dict[float, Measured]:
    answers = folder.read_frame(ANSWERS)
    neutral = folder.read_frame(_NEUTRAL) if folder.exists(_NEUTRAL) else None
    return {
        share: Measured(
            answers=_of_share(answers, share), neutral=None if neutral is None else _of_share(neutral, share)
        )
        for share in shares
    }


def _of_share(frame: pd.DataFrame, share: float) -> pd.DataFrame:
    return frame[frame["share"] == share].drop(columns="share").reset_index(drop=True)
