"""Distributed fine-tuning: the core's loop in Ray Train workers, with checkpoints that a restarted worker resumes from.

Every worker takes the batches that the step plan gives its rank, and reads no others; a batch is never split. With
`finetune.num_workers: 0` the same loop runs in this process, without Ray Train's start-up of some fifteen seconds.
"""

from __future__ import annotations

import logging
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

import ray.train
from ray.train.torch import TorchTrainer

from moe_ray.config.finetune import FinetuneConfig
from moe_ray.config.model import ModelConfig
from moe_ray.errors import MoeRayError
from moe_ray.finetuning.adapter_files import copy_adapter, local_adapter
from moe_ray.finetuning.checkpoint import save_checkpoint
from moe_ray.finetuning.fine_tune import FineTuned, continue_fine_tuning, fine_tune
from moe_ray.finetuning.history import HistoryWriter
from moe_ray.finetuning.step_report import StepReport
from moe_ray.finetuning.stored_batches import StoredBatches
from moe_ray.finetuning.trainer import MaskedTrainer
from moe_ray.identification.mask_files import read_masks
from moe_ray.orchestration.cluster.model_process import ModelHolder
from moe_ray.orchestration.cluster.ray_session import arrow_filesystem, require_cpus
from moe_ray.report.format import loss
from moe_ray.run_directory import CAPTURE, FINETUNE, IDENTIFY, PROMPTS, RunDirectory
from moe_ray.storage.folder import Folder

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class FinetuneJob:
    """What every worker needs to know; plain values.

    Attributes:
        model: the base model.
        config: hyperparameters and workers.
        seed: of the batch order.
        run_url: the run directory.
        out: its folder that gets the learned experts and the history.
        masks: its folder with the batches' masks.
        start: its folder with learned experts to go on from; empty = the base model.
        batch_weights: what the steps of the batches that it names are multiplied by.
    """

    model: ModelConfig
    config: FinetuneConfig
    seed: int
    run_url: str
    out: str = FINETUNE
    masks: str = IDENTIFY
    start: str = ""
    batch_weights: Mapping[int, float] = field(default_factory=dict)

    def folder(self) -> Folder:
        """Where the output goes."""
        return Folder.open(self.run_url).sub(self.out)


def finetune(job: FinetuneJob) -> dict[str, Any]:
    """Trains, writes the adapter and the history to `job.out`, and returns the numbers of `FineTuned`.

    A job that was killed is resumed from its last checkpoint when it is started again.
    """
    if job.config.num_workers == 0:
        return _run_worker(job, rank=0, world_size=1, resume_from=None, report=None)
    require_cpus(job.config.num_workers + 1, "fine-tuning")
    out = job.folder()
    trainer = TorchTrainer(
        _worker_loop,
        train_loop_config={"job": job},
        scaling_config=ray.train.ScalingConfig(
            num_workers=job.config.num_workers,
            use_gpu=job.config.gpus_per_worker > 0,
            resources_per_worker=_worker_resources(job.config),
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
        result = trainer.fit()
    except ray.train.WorkerGroupError as error:
        raise _error_of_worker(error) from None
    outcome: dict[str, Any] = result.return_value
    out.fs.rm(f"{out.path}/ray_train", recursive=True)
    return outcome


def _error_of_worker(error: Any) -> BaseException:
    """What a worker raised on purpose, without Ray Train's account of it; else the `WorkerGroupError` as it is."""
    for failure in error.worker_failures.values():
        cause = getattr(failure, "cause", None) or failure
        if isinstance(cause, MoeRayError):
            return cause
    original: BaseException = error
    return original


def _worker_resources(config: FinetuneConfig) -> dict[str, float]:
    resources = {"CPU": 1.0}
    if config.gpus_per_worker > 0:
        resources["GPU"] = config.gpus_per_worker
    return resources


def _worker_loop(loop_config: dict[str, Any]) -> dict[str, Any]:
    # Ray Train would print every report with its checkpoint's path; the step lines say what people want to know.
    logging.getLogger().setLevel(logging.WARNING)
    context = ray.train.get_context()
    rank, world_size = context.get_world_rank(), context.get_world_size()

    def report(trainer: MaskedTrainer) -> None:
        """Hands a checkpoint of rank 0 to Ray Train; the other ranks report without one."""
        if rank != 0:
            ray.train.report({"next_step": trainer.next_step})
            return
        with tempfile.TemporaryDirectory() as folder:
            save_checkpoint(trainer, folder)
            ray.train.report({"next_step": trainer.next_step}, checkpoint=ray.train.Checkpoint.from_directory(folder))

    checkpoint = ray.train.get_checkpoint()
    if checkpoint is None:
        return _run_worker(loop_config["job"], rank=rank, world_size=world_size, resume_from=None, report=report)
    with checkpoint.as_directory() as folder:
        return _run_worker(loop_config["job"], rank=rank, world_size=world_size, resume_from=folder, report=report)


def _run_worker(
    job: FinetuneJob,
    *,
    rank: int,
    world_size: int,
    resume_from: str | None,
    report: Callable[[MaskedTrainer], None] | None,
) -> dict[str, Any]:
    holder = ModelHolder(job.model, _workers_on_this_node(world_size))
    run, out = RunDirectory.open(job.run_url), job.folder()
    batches = StoredBatches(run.sub(PROMPTS), run.sub(CAPTURE))
    watched = run.validation_examples if job.config.patience else []
    masks = read_masks(run.sub(job.masks))
    history = HistoryWriter(out, resumed=resume_from is not None)

    def after_step(trainer: MaskedTrainer, step: StepReport) -> None:
        every = job.config.checkpoint_every or trainer.steps_per_epoch
        due = trainer.next_step % every == 0 or trainer.next_step == len(trainer.plan)
        if rank == 0:
            _say(step, len(trainer.plan))
            history.add(step.as_dict())
            if due:
                history.save()
        if due and report is not None:
            report(trainer)

    def tune(adapter: str) -> FineTuned:
        return fine_tune(
            holder.model,
            holder.tokenizer,
            batches,
            masks,
            config=job.config,
            seed=job.seed,
            adapter=adapter,
            base=job.model.path,
            rank=rank,
            world_size=world_size,
            resume_from=resume_from,
            validation=watched,
            batch_weights=job.batch_weights,
            after_step=after_step,
        )

    with tempfile.TemporaryDirectory() as adapter:
        if job.start:
            with local_adapter(run.sub(job.start)) as start:
                outcome = continue_fine_tuning(holder.model, start, adapter, masks, tune, saves=rank == 0)
        else:
            outcome = tune(adapter)
        if rank == 0:
            copy_adapter(Folder.open(adapter), out)
    history.save()
    return _plain(outcome)


def _workers_on_this_node(world_size: int) -> int:
    # Ray Train packs its workers, and knows.
    return 1 if world_size == 1 else int(ray.train.get_context().get_local_world_size())


def _plain(outcome: FineTuned) -> dict[str, Any]:
    plain = asdict(outcome)
    del plain["reports"]
    return plain


def _say(step: StepReport, total: int) -> None:
    # Standard output of a Ray worker is shown by the driver; its logging is not.
    names = ", ".join(str(batch.batch_idx) for batch in step.batches)
    print(  # noqa: T201
        f"step {step.step + 1}/{total}  batch_idx {names}  experts {step.num_experts}  loss {loss(step.loss)}  "
        f"{step.tokens_per_second:.0f} tokens/s",
        flush=True,
    )
