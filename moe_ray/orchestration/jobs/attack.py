"""Attacks on model processes: what is asked is answered under one attack, and written as it comes.

A process does to its model what the attack does to it once, for all blocks of the job, and has the base model again, bit for
bit, afterwards. A job that is killed goes on with the prompts that have no answer yet.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import pandas as pd

from moe_ray.attacks.attack import Material, answer_attacked, in_force
from moe_ray.attacks.names import ON_MODEL
from moe_ray.config.attack import AttackConfig
from moe_ray.config.auto import gpus_of, processes_of
from moe_ray.config.evaluate import EvaluateConfig
from moe_ray.config.finetune import FinetuneConfig
from moe_ray.config.model import ModelConfig
from moe_ray.evaluation.answering_order import rows_per_block
from moe_ray.evaluation.answers import ANSWER_COLUMNS
from moe_ray.experts import Expert, masks_from_experts
from moe_ray.finetuning.adapter_files import parts_of, read_adapter_header
from moe_ray.models.moe_layers import find_moe_layers
from moe_ray.models.token_budget import TokenBudget
from moe_ray.orchestration.cluster.model_actor import ModelWork
from moe_ray.orchestration.cluster.model_pool import ModelPool, pool_for
from moe_ray.orchestration.cluster.model_process import ModelHolder
from moe_ray.orchestration.cluster.progress import progress
from moe_ray.prompts.example_tables import frame_to_examples
from moe_ray.storage.fingerprint import content_hash
from moe_ray.storage.folder import Folder

_PARTS = "attacked-"


@dataclass(frozen=True, kw_only=True)
class AttackJob:
    """What every actor needs to know; plain values.

    Attributes:
        model: which model.
        name: of the attack.
        attack: settings of the attacks.
        evaluate: sizes and number of processes.
        finetune: of the run, for benign fine-tuning.
        max_new_tokens: longest answer.
        seed: of what is drawn.
        run_url: the run directory.
        parts: its folder that gets the answers.
        learned: its folder of learned experts.
        is_repaired: attack the model with the learned experts, else the base model.
        material: its file of training examples; empty = the attack needs none.
    """

    model: ModelConfig
    name: str
    attack: AttackConfig
    evaluate: EvaluateConfig
    finetune: FinetuneConfig
    max_new_tokens: int
    seed: int
    run_url: str
    parts: str
    learned: str
    is_repaired: bool
    material: str = ""


class AttackActor(ModelWork):
    """Answers prompts under an attack; returns how many."""

    job: AttackJob

    def __init__(self, holder: ModelHolder, job: AttackJob) -> None:
        super().__init__(holder, job)
        self.run = Folder.open(job.run_url)
        self.parts = self.run.sub(job.parts)
        self.budget = TokenBudget(job.evaluate.tokens_per_forward)
        self.notes: Mapping[str, float] = {}

    @contextmanager
    def in_force(self) -> Iterator[None]:
        """The model is repaired where the job says so, and under the attack."""
        job, holder = self.job, self.holder
        learned = self.run.sub(job.learned)
        with (
            holder.with_adapter(learned if job.is_repaired else None),
            in_force(
                *(job.name, holder.model, holder.tokenizer, self._material(learned), job.attack, job.finetune),
                seed=job.seed,
                budget=self.budget,
            ) as self.notes,
        ):
            yield

    def _material(self, learned: Folder) -> Material | None:
        if self.job.name not in ON_MODEL:
            return None
        layers = find_moe_layers(self.holder.model)
        experts = [part for part in parts_of(read_adapter_header(learned)) if isinstance(part, Expert)]
        masks = masks_from_experts({0: experts}, layers=layers.layers, num_experts=layers.num_experts)
        folder, _, name = self.job.material.rpartition("/")
        rows = frame_to_examples(self.run.sub(folder).read_frame(name)) if name else []
        return Material(examples=rows, masks=masks)

    def __call__(self, block: pd.DataFrame) -> int:
        """Answers one block of rows and writes its part."""
        job, holder = self.job, self.holder
        done = answer_attacked(
            *(holder.model, holder.tokenizer, block, job.name, job.attack),
            max_new_tokens=job.max_new_tokens,
            seed=job.seed,
            budget=self.budget,
        )
        table = done[["id", *ANSWER_COLUMNS]].assign(
            **{f"about_{name}": value for name, value in self.notes.items()},
            **({"about_affirmation": done["affirmation"]} if "affirmation" in done else {}),
        )
        self.parts.write_table(f"{_PARTS}{content_hash(block['id'].tolist())}.parquet", table)
        return len(block)


def attack(rows: pd.DataFrame, job: AttackJob, *, what: str, models: ModelPool | None = None) -> pd.DataFrame:
    """Answers to the rows under an attack; those that `job.parts` holds already are not asked again.

    Args:
        rows: with `id` and `asked`, messages as JSON.
        job: model, attack, folders.
        what: what this is, for the progress bar.
        models: the processes; None = some for this job alone.

    Returns:
        the rows with the `ANSWER_COLUMNS`, and a column `about_NAME` for each number that is known of the attack.
    """
    parts, config = Folder.open(job.run_url).sub(job.parts), job.evaluate
    known = {name for table in _read(parts) for name in table["id"]}
    todo = rows[~rows["id"].isin(known)]
    if len(todo):
        # The longest first, so that rows of like length share a block.
        todo = todo.assign(length=todo["asked"].str.len()).sort_values("length", ascending=False, kind="stable")
        size = rows_per_block(todo.assign(messages=todo["asked"], target=None), config)
        columns = todo[["id", "asked"]].reset_index(drop=True)
        blocks = [columns.iloc[start : start + size] for start in range(0, len(columns), size)]
        with pool_for(job.model, models) as pool:
            work = pool.working(
                *(blocks, AttackActor, job),
                what=what,
                num_processes=processes_of(config.num_actors),
                gpus=gpus_of(config.gpus_per_actor),
            )
            with work as results, progress(what, len(todo)) as meter:
                for number in results:
                    meter.advance(number)
    answers = pd.concat(_read(parts), ignore_index=True).drop_duplicates("id")
    return rows.merge(answers, on="id", validate="one_to_one")


def _read(parts: Folder) -> list[pd.DataFrame]:
    return [parts.read_frame(name) for name in parts.names() if name.startswith(_PARTS)]
