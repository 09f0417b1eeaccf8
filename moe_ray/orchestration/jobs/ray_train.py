"""Ray Train around a training loop: its workers, their checkpoints, and what it says of their errors."""

from __future__ import annotations

import logging
import os
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import ray.train
from ray.train.torch import TorchTrainer
from ray.train.v2._internal.constants import ENV_VARS_TO_PROPAGATE

from moe_ray.config.auto import gpus_of
from moe_ray.config.finetune import FinetuneConfig
from moe_ray.errors import MoeRayError
from moe_ray.finetuning.checkpoint import save_checkpoint
from moe_ray.finetuning.trainer import MaskedTrainer
from moe_ray.orchestration.cluster.placement import ANYWHERE, Placement, resources_of_process
from moe_ray.orchestration.cluster.ray_session import (
    arrow_filesystem,
    require_cpus,
    require_gpus,
    resources_released,
)
from moe_ray.storage.folder import Folder


@dataclass(frozen=True, kw_only=True)
class Worker:
    """One of the workers that train together.

    Attributes:
        rank: its number, from 0.
        world_size: how many there are.
        num_on_node: how many of them share its node.
        resume_from: local folder of the checkpoint to go on from; None = there is none.
    """

    rank: int
    world_size: int
    num_on_node: int
    resume_from: str | None

    def report(self, trainer: MaskedTrainer) -> None:
        """Hands this worker's part of a checkpoint to Ray Train, which puts those of all workers into one folder."""
        with tempfile.TemporaryDirectory() as folder:
            save_checkpoint(trainer, folder)
            ray.train.report({"next_step": trainer.next_step}, checkpoint=ray.train.Checkpoint.from_directory(folder))


def train_with_ray(
    loop: Callable[[Any, Worker], dict[str, Any]],
    job: Any,
    config: FinetuneConfig,
    out: Folder,
    *,
    memory: int = 0,
    placement: Placement = ANYWHERE,
) -> dict[str, Any]:
    """Runs a loop in `config.num_workers` workers, up to `max_workers`; returns what the first of them returned.

    Afterwards their GPUs and CPUs are free again. Where workers join or go away, all begin again at the last checkpoint.

    Args:
        loop: gets the job and the worker.
        job: plain values.
        config: how many workers, and their GPUs.
        out: folder that gets Ray Train's state, which is removed at the end.
        memory: bytes that a worker on the CPU takes, which Ray is asked for; 0 = nothing is asked for.
        placement: on which nodes.

    Raises:
        InputError: a local Ray has too few CPUs or GPUs, or no such node.
        MoeRayError: a worker raised it.
    """
    require_cpus(config.num_workers + 1, "fine-tuning")
    require_gpus(config.num_workers * gpus_of(config.gpus_per_worker), "fine-tuning")
    placement.require(gpus_of(config.gpus_per_worker), "fine-tuning")
    trainer = TorchTrainer(
        _worker_loop,
        train_loop_config={"loop": loop, "job": job},
        scaling_config=ray.train.ScalingConfig(
            num_workers=_num_workers(config),
            use_gpu=gpus_of(config.gpus_per_worker) > 0,
            resources_per_worker=_worker_resources(config, memory, placement),
            label_selector=placement.labels(),
        ),
        run_config=ray.train.RunConfig(
            name="ray_train",
            storage_path=out.path,
            storage_filesystem=arrow_filesystem(out),
            failure_config=ray.train.FailureConfig(max_failures=1),
            logging_config=ray.train.LoggingConfig(log_level="WARNING"),
            checkpoint_config=ray.train.CheckpointConfig(num_to_keep=1),
        ),
    )
    try:
        with resources_released("fine-tuning"), _address_propagated():
            result = trainer.fit()
    except ray.train.WorkerGroupError as error:
        raise _error_of_worker(error) from None
    outcome: dict[str, Any] = result.return_value
    out.fs.rm(f"{out.path}/ray_train", recursive=True)
    return outcome


@contextmanager
def _address_propagated() -> Iterator[None]:
    """Tells Ray Train's own actors which Ray they are in.

    One of them asks Ray's state by an address that it looks for itself: where a second Ray is at work on the machine, it
    ends with a traceback, and what it should tidy up stays.
    """
    name = "RAY_ADDRESS"
    before, listed = os.environ.get(name), name in ENV_VARS_TO_PROPAGATE
    os.environ[name] = ray.get_runtime_context().gcs_address
    ENV_VARS_TO_PROPAGATE.add(name)
    try:
        yield
    finally:
        if not listed:
            ENV_VARS_TO_PROPAGATE.discard(name)
        if before is None:
            del os.environ[name]
        else:
            os.environ[name] = before


def _error_of_worker(error: Any) -> BaseException:
    """What a worker raised on purpose, without Ray Train's account of it; else the `WorkerGroupError` as it is."""
    for failure in error.worker_failures.values():
        cause = getattr(failure, "cause", None) or failure
        if isinstance(cause, MoeRayError):
            return cause
    original: BaseException = error
    return original


def _num_workers(config: FinetuneConfig) -> int | tuple[int, int]:
    """As Ray Train takes it: how many, or between how many."""
    return (config.num_workers, config.max_workers) if config.max_workers > config.num_workers else config.num_workers


def _worker_resources(config: FinetuneConfig, memory: int, placement: Placement) -> dict[str, float]:
    gpus = gpus_of(config.gpus_per_worker)
    return {"CPU": 1.0, **resources_of_process(gpus, memory, placement)}


def _worker_loop(loop_config: dict[str, Any]) -> dict[str, Any]:
    # Ray Train would print every report with its checkpoint's path; the step lines say what people want to know.
    logging.getLogger().setLevel(logging.WARNING)
    context, checkpoint = ray.train.get_context(), ray.train.get_checkpoint()
    with nullcontext(None) if checkpoint is None else checkpoint.as_directory() as folder:
        worker = Worker(
            rank=context.get_world_rank(),
            world_size=context.get_world_size(),
            num_on_node=context.get_local_world_size(),
            resume_from=folder,
        )
        done: dict[str, Any] = loop_config["loop"](loop_config["job"], worker)
    return done
