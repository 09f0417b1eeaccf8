"""Fine-tuning: the core's loop in one process or in Ray Train workers, with checkpoints that a restarted one resumes from.

Several workers are Ray Train's. Every worker takes the batches that the step plan gives its rank, and
reads no others; a batch is never split. One worker needs none of Ray Train's start-up of some fifteen seconds:
the same loop runs in a model process that is there already, or with `finetune.num_workers: 0` in this one.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

from moe_ray.config.auto import gpus_of
from moe_ray.config.finetune import FinetuneConfig
from moe_ray.config.model import ModelConfig
from moe_ray.errors import InputError
from moe_ray.finetuning.adapter import experts_restored
from moe_ray.finetuning.adapter_files import copy_adapter, local_adapter, parts_of, read_adapter_header
from moe_ray.finetuning.fine_tune import FineTuned, continue_fine_tuning, fine_tune, learned_parts
from moe_ray.finetuning.history import PLANNED_STEPS, HistoryWriter
from moe_ray.finetuning.step_report import StepReport
from moe_ray.finetuning.trainer import MaskedTrainer
from moe_ray.finetuning.training_batches import TrainingBatches
from moe_ray.identification.mask_files import read_masks
from moe_ray.orchestration.cluster.model_actor import ModelWork
from moe_ray.orchestration.cluster.model_pool import ModelPool, pool_for
from moe_ray.orchestration.cluster.model_process import ModelHolder
from moe_ray.orchestration.cluster.placement import ANYWHERE
from moe_ray.orchestration.jobs.training_checkpoints import CHECKPOINTS, StoredCheckpoints
from moe_ray.orchestration.jobs.training_progress import training_shown
from moe_ray.run_directory import CAPTURE, FINETUNE, IDENTIFY, PROMPTS, RunDirectory
from moe_ray.storage.folder import Folder

if TYPE_CHECKING:
    from moe_ray.orchestration.jobs.ray_train import Worker


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
        memory: bytes that each of several workers takes on the CPU, which Ray is asked for; 0 = nothing is asked for.
    """

    model: ModelConfig
    config: FinetuneConfig
    seed: int
    run_url: str
    out: str = FINETUNE
    masks: str = IDENTIFY
    start: str = ""
    batch_weights: Mapping[int, float] = field(default_factory=dict)
    memory: int = 0

    def folder(self) -> Folder:
        """Where the output goes."""
        return Folder.open(self.run_url).sub(self.out)


def finetune(job: FinetuneJob, models: ModelPool | None = None) -> dict[str, Any]:
    """Trains, writes the adapter and the history to `job.out`, and returns the numbers of `FineTuned`.

    A job that was killed is resumed from its last checkpoint when it is started again.

    Args:
        job: what is trained.
        models: the model processes, one of which trains where there is one worker; Ray Train's workers, which hold models
            of their own, get their place. None = a process for this job alone.
    """
    with training_shown(job.folder(), log_every=job.config.log_every):
        return _train(job, models)


def _train(job: FinetuneJob, models: ModelPool | None) -> dict[str, Any]:
    if job.config.num_workers == 0:
        return _train_alone(ModelHolder(job.model, 1), job)
    if not job.config.needs_ray_train:
        if job.model.num_shards > 1:
            raise InputError(
                f"fine-tuning: got model.num_shards={job.model.num_shards} with finetune.shard={job.config.shard} and "
                f"finetune.num_workers={job.config.num_workers}, expected workers over which the model is spread too: set "
                "finetune.shard=fsdp and finetune.num_workers of 2 or more"
            )
        with (
            pool_for(job.model, models) as pool,
            pool.working(
                [None],
                *(FinetuneActor, job),
                what="fine-tuning",
                gpus=gpus_of(job.config.gpus_per_worker),
                resumes=True,
            ) as results,
        ):
            (outcome,) = results
        return dict(outcome)
    from moe_ray.orchestration.jobs.ray_train import train_with_ray  # two seconds that most runs are spared

    if models is not None:
        models.release()
    placement = ANYWHERE if models is None else models.placement
    return train_with_ray(_train_in_worker, job, job.config, job.folder(), memory=job.memory, placement=placement)


class FinetuneActor(ModelWork):
    """Trains in a model process, which has the base model again afterwards."""

    job: FinetuneJob

    @contextmanager
    def in_force(self) -> Iterator[None]:
        """Whatever is learned, also by the round before, is put back."""
        run = RunDirectory.open(self.job.run_url)
        parts = dict.fromkeys(learned_parts(read_masks(run.sub(self.job.masks)), self.job.config))
        if self.job.start:
            parts |= dict.fromkeys(parts_of(read_adapter_header(run.sub(self.job.start))))
        with experts_restored(self.holder.model, parts):
            yield

    def __call__(self, block: None) -> dict[str, Any]:
        """Trains to the end; returns the numbers of `FineTuned`."""
        return _train_alone(self.holder, self.job)


def _train_alone(holder: ModelHolder, job: FinetuneJob) -> dict[str, Any]:
    checkpoints = StoredCheckpoints(job.folder().sub(CHECKPOINTS))
    with checkpoints.latest() as folder:
        outcome = _run_worker(job, holder, rank=0, world_size=1, resume_from=folder, report=checkpoints.save)
    checkpoints.delete()
    return outcome


def _train_in_worker(job: FinetuneJob, worker: Worker) -> dict[str, Any]:
    num_shards = worker.world_size if job.config.shard == "fsdp" else 0
    holder = ModelHolder(job.model, worker.num_on_node, num_shards=num_shards)
    return _run_worker(
        job,
        holder,
        rank=worker.rank,
        world_size=worker.world_size,
        resume_from=worker.resume_from,
        report=worker.report,
    )


def _run_worker(
    job: FinetuneJob,
    holder: ModelHolder,
    *,
    rank: int,
    world_size: int,
    resume_from: str | None,
    report: Callable[[MaskedTrainer], None],
) -> dict[str, Any]:
    run, out = RunDirectory.open(job.run_url), job.folder()
    batches = TrainingBatches(run.sub(PROMPTS), run.sub(CAPTURE))
    watched = run.validation_examples if job.config.patience else []
    masks = read_masks(run.sub(job.masks))
    history = HistoryWriter(out, resumed=resume_from is not None)

    def after_step(trainer: MaskedTrainer, step: StepReport) -> None:
        every = job.config.checkpoint_every or trainer.steps_per_epoch
        due = trainer.next_step % every == 0 or trainer.next_step == len(trainer.plan)
        if rank == 0:
            if step.warning and job.config.num_workers > 0:
                # In the command's own process, the trainer's log is shown.
                print(f"WARNING {step.warning}", flush=True)  # noqa: T201
            history.add({**step.as_dict(), PLANNED_STEPS: len(trainer.plan)})
            if due:
                history.save()
        if due:
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
                outcome = continue_fine_tuning(
                    holder.model, start, adapter, masks, tune, config=job.config, saves=rank == 0
                )
        else:
            outcome = tune(adapter)
        if rank == 0:
            copy_adapter(Folder.open(adapter), out)
    history.save()
    return _plain(outcome)


def _plain(outcome: FineTuned) -> dict[str, Any]:
    plain = asdict(outcome)
    del plain["reports"]
    return plain
