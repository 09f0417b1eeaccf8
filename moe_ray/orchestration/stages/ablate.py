"""Stage `ablate`: whether the selected experts are what the unsafe answers come from, before anything is trained."""

from __future__ import annotations

import logging
from dataclasses import replace
from typing import Any

import pandas as pd

from moe_ray.ablation.ablate import Ablation
from moe_ray.ablation.cost import RunSize, what_is_affordable
from moe_ray.ablation.plan import chosen_batches, plan_batches, prompts_of_batches
from moe_ray.config.ablate import AblateConfig
from moe_ray.errors import InputError
from moe_ray.identification.selection import ranking_column
from moe_ray.models.loading import check_maskable
from moe_ray.orchestration.jobs import ablate as job
from moe_ray.orchestration.stages.context import Context
from moe_ray.orchestration.stages.identify import selecting_settings
from moe_ray.run_directory import (
    ABLATE,
    ABLATION_BATCHES,
    ABLATION_EXPERTS,
    ABLATION_TABLE,
    ANSWERS,
    CAPTURE,
    EFFECTS,
    IDENTIFY,
    PARTS,
    PROMPTS,
    RESPONSES,
)
from moe_ray.storage.fingerprint import content_hash, frame_hash
from moe_ray.storage.folder import Folder
from moe_ray.storage.stage import MADE, Outcome, Stage

logger = logging.getLogger(__name__)


def ablate(run: Context, config: AblateConfig) -> Outcome:
    """The causal check; makes `ablation`.

    Args:
        run: which has masks.
        config: the section `ablate`, or what is affordable of it.
    """
    settings = run.settings("ablation")
    del settings["ablate.run"]  # says when, not what
    inputs = {
        "masks": run.made(IDENTIFY, "masks"),
        "counts": run.made(CAPTURE, "counts"),
        "left_out": run.made(CAPTURE, "left_out"),
        "examples": run.made(PROMPTS, "examples"),
        # By what is asked: another target is no reason to ask again.
        "held_out": frame_hash(_held_out(run)[["id", "label", "category", "pair", "messages"]]),
        **selecting_settings(run),
        **settings,
        "ablate.leave_one_out": config.leave_one_out,
        "ablate.curve": config.curve,
        "seed": run.config.seed,
        **run.checkpoint,
        **run.numerics(config.gpus_per_actor),
    }
    return run.do(Stage(name=ABLATE, inputs=inputs, work=lambda folder: _ablate(run, folder, config)))


def affordable(run: Context) -> AblateConfig | None:
    """What the full workflow does of the check; None = nothing of it, which the log explains."""
    config = run.config.ablate
    if config.run != "auto":
        return config if config.run == "true" else None
    masks, captured = run.directory.masks, run.outcomes[CAPTURE].notes
    counted = max(1, captured["examples"] - captured["quarantined"])
    sizes = [len(masks.selected[batch]) for batch in masks.trained_batches]
    size = RunSize(
        batches=len(sizes),
        experts=sum(sizes) / max(1, len(sizes)),
        examples=counted,
        test_examples=run.outcomes[PROMPTS].notes["test_examples"],
        tokens_per_example=captured["tokens"] / counted,
        epochs=run.config.finetune.epochs,
        answer_tokens=run.config.evaluate.max_new_tokens,
    )
    try:
        check_maskable(run.model)
    except InputError as error:
        logger.warning("ablate: left out; %s", error)
        return None
    estimate = what_is_affordable(size, config)
    logger.info(estimate.in_words())
    return estimate.config


def _ablate(run: Context, folder: Folder, config: AblateConfig) -> dict[str, Any]:
    directory = run.directory
    masks, categories = directory.masks, directory.categories
    chosen = {batch: categories[batch] for batch in chosen_batches(masks, categories, config.max_batches)}
    prompts = prompts_of_batches(chosen, _own_prompts(run, list(chosen)), _held_out(run), config, seed=run.config.seed)
    plans = plan_batches(
        *(prompts, masks, directory.risk, categories, config),
        num_experts_per_tok=directory.num_experts_per_tok,
        seed=run.config.seed,
        column=ranking_column(directory.identify_config),
    )
    own = [plan.batch_idx for plan in plans if plan.source == "batch"]
    if own and config.source == "held_out":
        logger.warning(
            "ablate: %d of %d batches are asked their own prompts, which chose the experts, since too few of their "
            "category are held out: %s",
            *(len(own), len(plans), own[:20]),
        )
    answers = _captured_answers(run, own, config.max_new_tokens)
    plans = [replace(plan, answers=answers.get(plan.batch_idx, {})) for plan in plans]
    work = job.AblateJob(model=run.model, config=config, parts=folder.sub(PARTS).url)
    found = job.ablate(plans, work, seed=run.config.seed, models=run.models)
    write_findings(folder, found)
    digest = content_hash([found.verdict, frame_hash(found.effects)] if len(found.effects) else [found.verdict])
    sources = {str(plan.batch_idx): plan.source for plan in plans}
    return {**found.as_dict(), "sources": sources, MADE: {"ablation": digest}}


def _held_out(run: Context) -> pd.DataFrame:
    """The validation split, so that nothing is learned of the test split; that where there is no other."""
    validation = run.directory.validation
    return run.directory.test if validation is None else validation


def _own_prompts(run: Context, batches: list[int]) -> pd.DataFrame:
    """The examples of these batches that can be asked: those that were counted whole."""
    pieces = run.directory.stored_batches.pieces()
    rows = pd.concat([piece[piece["batch_idx"].isin(batches)] for piece in pieces], ignore_index=True)
    return run.directory.askable(rows)


def _captured_answers(run: Context, batches: list[int], most: int) -> dict[int, dict[str, list[int]]]:
    """By batch and id, the answers that the capture had the model give, where they are what the check would ask for.

    Args:
        run: whose capture is done.
        batches: that are asked their own prompts.
        most: tokens of an answer that the check looks at.
    """
    capture, found = run.config.capture, dict[int, dict[str, list[int]]]()
    folder = run.directory.sub(RESPONSES)
    if not batches or not capture.generate or capture.temperature > 0:
        return found
    for name in folder.parquet_names():
        rows = folder.read_frame(name)
        for batch, key, ids, ended in zip(rows["batch_idx"], rows["id"], rows["ids"], rows["ended"], strict=True):
            if batch in batches and (ended or len(ids) >= most):
                found.setdefault(int(batch), {})[key] = [int(token) for token in ids]
    return found


def write_findings(folder: Folder, found: Ablation) -> None:
    """Writes the effects, the answers and the tables for people."""
    if len(found.effects):
        folder.write_table(EFFECTS, found.effects)
    if len(found.answers):
        folder.write_table(ANSWERS, found.answers)
    tables = {ABLATION_TABLE: found.table, ABLATION_BATCHES: found.batches, ABLATION_EXPERTS: found.experts}
    for name, table in tables.items():
        folder.write_bytes(name, table.to_csv(index=False).encode())
