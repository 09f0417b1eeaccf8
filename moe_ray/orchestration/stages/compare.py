"""Stage `compare`: per-batch masks against the baselines, trained and measured alike on the held-out examples.

Each arm is a stage of its own, so that asking for one more baseline runs only that one.
"""

from __future__ import annotations

from dataclasses import dataclass

import pandas as pd

from moe_ray.config.auto import gpus_of
from moe_ray.identification.selection import ranking_column
from moe_ray.orchestration.jobs.compare import CompareJob, run_arms
from moe_ray.orchestration.stages.context import Context
from moe_ray.report.comparison_text import verdict
from moe_ray.run_directory import CAPTURE, COMPARE, COMPARISON, PROMPTS, TRANSFER_TABLE, VERDICT
from moe_ray.studies.baselines import BASE, masks_to_compare, plan_arms
from moe_ray.studies.comparison import comparison_table
from moe_ray.studies.transfer import plan_transfer, transfer_table


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """What a comparison found.

    Attributes:
        arms: from `comparison_table`, a row per arm and share of its steps.
        transfer: from `transfer_table`; None = it was not asked for.
    """

    arms: pd.DataFrame
    transfer: pd.DataFrame | None

    def __repr__(self) -> str:
        arms = self.arms["arm"].nunique()
        return f"Comparison({arms} arms{'' if self.transfer is None else ', with transfer between categories'})"


def compare(run: Context) -> Comparison:
    """Per-batch masks and baselines, and where asked for each category trained alone."""
    settings, train = run.config.compare, run.config.finetune
    category_of = run.directory.categories
    masks = masks_to_compare(run.directory.masks, settings, category_of)
    job = CompareJob(
        model=run.model,
        evaluate=run.config.evaluate,
        seed=run.config.seed,
        num_seeds=settings.seeds,
        shares=settings.at,
        run_url=run.directory.folder.url,
        union_LE=masks.union,
        trained_batches=masks.trained_batches,
        num_actors=settings.max_concurrent,
        gpus_per_actor=gpus_of(train.gpus_per_worker),
        neutral_texts=run.prompts.neutral,
        memory=run.models.memory,
        placement=run.models.placement,
    )
    measured = {"test": run.made(PROMPTS, "test"), **run.measurement()}
    trained = {"targets": run.made(PROMPTS, "targets"), "left_out": run.made(CAPTURE, "left_out")}
    folder = run.directory.sub(COMPARE)
    column = ranking_column(run.directory.identify_config)
    arms = plan_arms(masks, run.directory.risk, train, settings, category_of, column=column)
    alone = []
    if settings.transfer:
        tested = set(run.directory.test["category"].dropna())
        alone = plan_transfer(run.directory.masks, train, settings, category_of, tested=tested)
    run.models.release()  # arms hold models of their own
    results = {
        result.name: result for result in run_arms(job, [*arms, *alone], folder, measured=measured, trained=trained)
    }
    found = Comparison(
        arms=comparison_table(
            [results[name] for name in (BASE, *(arm.name for arm in arms))],
            trained=settings.categories or None,
        ),
        transfer=transfer_table(results[BASE], {arm.category: results[arm.name] for arm in alone}) if alone else None,
    )
    folder.write_table(COMPARISON, found.arms)
    # What an earlier comparison said of transfer belongs to its settings.
    folder.remove(TRANSFER_TABLE)
    if found.transfer is not None:
        folder.write_table(TRANSFER_TABLE, found.transfer)
    folder.write_json(VERDICT, verdict(found.arms, found.transfer, budget=settings.budget))
    return found
