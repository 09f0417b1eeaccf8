"""The causal check on model processes: a batch is a block, which writes what it measured as it goes.

A batch's cost is written last and makes its part whole, so a check that is killed goes on with the batches that have none.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from moe_ray.ablation.ablate import Ablation, found_in, of_copies
from moe_ray.ablation.effects import BatchEffects, Cost, measure_batch
from moe_ray.ablation.plan import BatchPlan
from moe_ray.config.ablate import AblateConfig
from moe_ray.config.auto import gpus_of, processes_of
from moe_ray.config.model import ModelConfig
from moe_ray.models.token_budget import TokenBudget
from moe_ray.orchestration.cluster.model_actor import ModelWork
from moe_ray.orchestration.cluster.model_pool import ModelPool, pool_for
from moe_ray.orchestration.cluster.model_process import ModelHolder
from moe_ray.orchestration.cluster.progress import progress
from moe_ray.storage.folder import Folder


@dataclass(frozen=True, kw_only=True)
class AblateJob:
    """What every actor needs to know; plain values.

    Attributes:
        model: which model.
        config: of the check.
        parts: URL of the folder that gets the parts.
    """

    model: ModelConfig
    config: AblateConfig
    parts: str


class AblateActor(ModelWork):
    """Measures one batch and writes its part; returns whether the model's experts are copies, and then measures nothing."""

    job: AblateJob

    def __init__(self, holder: ModelHolder, job: AblateJob) -> None:
        super().__init__(holder, job)
        self.parts = Folder.open(job.parts)
        self.budget = TokenBudget(job.config.tokens_per_forward)
        self.are_copies = holder.experts_are_copies()

    def __call__(self, block: BatchPlan) -> bool:
        """Does one batch."""
        if not self.are_copies:
            holder = self.holder
            found = measure_batch(holder.model, holder.tokenizer, block, self.job.config, budget=self.budget)
            name = _name(block.batch_idx)
            self.parts.write_table(f"effects-{name}.parquet", found.effects)
            self.parts.write_table(f"answers-{name}.parquet", found.answers)
            self.parts.write_json(f"cost-{name}.json", vars(found.cost))
        return self.are_copies


def ablate(plans: Sequence[BatchPlan], job: AblateJob, *, seed: int, models: ModelPool | None = None) -> Ablation:
    """The causal check of the batches; those that `job.parts` holds already are not measured again.

    Args:
        plans: of the batches.
        job: model, settings, folder.
        seed: of drawn relabellings.
        models: the processes; None = some for this job alone.

    Raises:
        InputError: a prompt does not fit in memory, or the model's experts cannot be masked.
    """
    parts, config = Folder.open(job.parts), job.config
    todo = [plan for plan in plans if not parts.exists(f"cost-{_name(plan.batch_idx)}.json")]
    if todo:
        with pool_for(job.model, models) as pool:
            work = pool.working(
                *(todo, AblateActor, job),
                what="ablate",
                num_processes=processes_of(config.num_actors),
                gpus=gpus_of(config.gpus_per_actor),
            )
            with work as results, progress("ablate", len(todo)) as meter:
                are_copies = False
                for said in results:
                    are_copies = are_copies or said
                    meter.advance()
        if are_copies:
            return of_copies()
    return found_in([_read(parts, plan.batch_idx) for plan in plans], config, seed=seed)


def _name(batch_idx: int) -> str:
    return f"{batch_idx:08d}"


def _read(parts: Folder, batch_idx: int) -> BatchEffects:
    name = _name(batch_idx)
    return BatchEffects(
        effects=parts.read_frame(f"effects-{name}.parquet"),
        answers=parts.read_frame(f"answers-{name}.parquet"),
        cost=Cost(**parts.read_json(f"cost-{name}.json")),
    )
