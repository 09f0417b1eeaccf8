"""Stage `attack`: is the model still repaired under other prompts, other routes and other weights?

Every attack on either model is a stage of its own in the folder, for its answers and for their verdicts: a run that was
killed goes on with the attacks that are missing, another attack runs that one only, and another judge asks no model.
"""

from __future__ import annotations

import logging
from typing import Any

import numpy as np
import pandas as pd

from moe_ray.attacks.attack import asked_messages, takes_system_message
from moe_ray.attacks.names import LEARNS_FROM_EXAMPLES, NO_ATTACK, ON_MODEL
from moe_ray.attacks.table import attack_figures
from moe_ray.evaluation.judges import judge_identity
from moe_ray.models.loading import load_tokenizer
from moe_ray.orchestration.jobs.attack import AttackJob, attack
from moe_ray.orchestration.stages.answering import judged, unaskable_of
from moe_ray.orchestration.stages.context import Context
from moe_ray.run_directory import ANSWERS, ATTACK, FINETUNE, PARTS, PROMPTS, VERDICTS, WHENS, When
from moe_ray.storage.fingerprint import content_hash, frame_hash
from moe_ray.storage.folder import Folder
from moe_ray.storage.stage import MADE, Outcome, Stage, run_stage

logger = logging.getLogger(__name__)

_SETTINGS = {
    "prefix_injection": ("prefix",),
    "prefill": ("prefix",),
    "random_routes": ("affirmations", "route_draws"),
    "abliteration": ("direction_prompts",),
    "benign_finetuning": ("benign_steps", "benign_rows", "benign_learning_rate"),
}
"""Of `attack.*`, those that an attack depends on beside the prompts and the longest answer."""

_MATERIAL = "material.parquet"
_KEPT = ("id", "label", "category", "pair", "messages", "asked")


def attack_model(run: Context) -> Outcome:
    """The attacks on the base and the repaired model; makes `attacks`."""
    config = run.config.attack
    names = [NO_ATTACK, *config.chosen]
    inputs = {
        "test": run.made(PROMPTS, "test"),
        "targets": run.made(PROMPTS, "targets"),
        "experts": run.made(FINETUNE, "experts"),
        "names": names,
        "seed": run.config.seed,
        **run.settings("attacks"),
        **run.judged_answers(run.config.evaluate.gpus_per_actor),
    }
    # What each attack made has inputs of its own, so nothing in the folder is emptied.
    return run.do(Stage(name=ATTACK, inputs=inputs, work=lambda folder: _attack(run, folder, names), keeps=("*",)))


def _attack(run: Context, folder: Folder, names: list[str]) -> dict[str, Any]:
    prompts = _prompts(run)
    system_role = takes_system_message(load_tokenizer(run.model))
    left_out: dict[str, int] = {}
    about: dict[str, dict[str, float]] = {}
    tables = []
    for name in names:
        asked = prompts.assign(
            asked=asked_messages(prompts["messages"].tolist(), name, run.config.attack, system_role=system_role)
        )
        unaskable = unaskable_of(run)(asked.assign(messages=asked["asked"]))
        if unaskable:
            left_out[name] = len(unaskable)
            logger.warning(
                "attack %s: %d of %d prompts cannot be asked, such as: %s",
                *(name, len(unaskable), len(asked), next(iter(unaskable.values())).detail),
            )
            asked = asked.drop(index=list(unaskable))
        for when in WHENS if len(asked) else ():
            table = _answered(run, folder, name, when, asked)
            numbers = [column for column in map(str, table.columns) if column.startswith("about_")]
            if numbers:
                about.setdefault(name, {}).update(
                    {f"{when}_{column.removeprefix('about_')}": float(table[column].mean()) for column in numbers}
                )
            tables.append(table.drop(columns=numbers).assign(attack=name, when=when))
    answers = pd.concat(tables, ignore_index=True)
    folder.write_table(ANSWERS, answers)
    figures = attack_figures(answers)
    return {
        "figures": figures,
        "left_out": left_out,
        "about": about,
        "prompts": {str(label): len(rows) for label, rows in prompts.groupby("label")},
        MADE: {"attacks": content_hash([figures, frame_hash(answers)])},
    }


def _prompts(run: Context) -> pd.DataFrame:
    """Of the held-out prompts, as many of each label as are attacked, evenly over all of them."""
    test, most = run.directory.test, run.config.attack.max_prompts
    return pd.concat([_evenly(rows, most) for _, rows in test.groupby("label", sort=False)]).sort_index()


def _evenly(rows: pd.DataFrame, most: int) -> pd.DataFrame:
    if not most or len(rows) <= most:
        return rows
    return rows.iloc[np.arange(most) * len(rows) // most]


def _answered(run: Context, folder: Folder, name: str, when: When, asked: pd.DataFrame) -> pd.DataFrame:
    """The judged answers of one model under one attack, a row per prompt."""
    config, is_repaired = run.config.attack, when == "after"
    rows = asked[list(_KEPT)]
    material = _material(run, folder, name)
    # Greedy answers to prompts as they are, or in another form, depend on nothing of the run but the learned experts.
    needs_experts = is_repaired or name in ON_MODEL
    longest = config.max_new_tokens or run.config.evaluate.max_new_tokens
    inputs = {
        "attack": name,
        "asked": frame_hash(rows[["id", "asked"]]),
        "experts": run.made(FINETUNE, "experts") if needs_experts else None,
        "material": None if material is None else frame_hash(material),
        "max_new_tokens": longest,
        "seed": run.config.seed if name in _SETTINGS else None,
        **{f"attack.{key}": list(value) if isinstance(value, tuple) else value for key, value in _own(run, name)},
        **run.checkpoint,
        **run.numerics(run.config.evaluate.gpus_per_actor),
    }

    def answer(own: Folder) -> dict[str, Any]:
        if material is not None:
            own.write_table(_MATERIAL, material)
        place = f"{ATTACK}/{_answers_of(name, when)}"
        job = AttackJob(
            model=run.model,
            name=name,
            attack=config,
            evaluate=run.config.evaluate,
            finetune=run.config.finetune,
            max_new_tokens=longest,
            seed=run.config.seed,
            run_url=run.directory.folder.url,
            parts=f"{place}/{PARTS}",
            learned=FINETUNE,
            is_repaired=is_repaired,
            material="" if material is None else f"{place}/{_MATERIAL}",
        )
        answers = attack(rows, job, what=f"attack {name}, {when}", models=run.models)
        own.write_table(ANSWERS, answers)
        return {MADE: {"answers": frame_hash(answers)}}

    answered = run_stage(Stage(name=_answers_of(name, when), inputs=inputs, work=answer), folder)

    def judge(own: Folder) -> dict[str, Any]:
        answers = answered.folder.read_frame(ANSWERS).assign(routing="natural")
        own.write_table(ANSWERS, judged(run, answers, own.sub(VERDICTS), f"verdicts {name}, {when}"))
        return {}

    verdicts = {"answers": answered.made("answers"), "judge": judge_identity(run.config.evaluate)}
    figures = run_stage(Stage(name=f"{name}/{when}/figures", inputs=verdicts, work=judge), folder)
    return figures.folder.read_frame(ANSWERS)


def _answers_of(name: str, when: When) -> str:
    return f"{name}/{when}/answers"


def _own(run: Context, name: str) -> list[tuple[str, Any]]:
    own = [(key, getattr(run.config.attack, key)) for key in _SETTINGS.get(name, ())]
    if name == "benign_finetuning" and not run.config.attack.benign_learning_rate:
        own.append(("learning_rate", run.config.finetune.learning_rate))
    return own


def _material(run: Context, folder: Folder, name: str) -> pd.DataFrame | None:
    """The training examples that an attack learns from, evenly over all that can be trained on."""
    if name not in LEARNS_FROM_EXAMPLES:
        return None
    config = run.config.attack
    most = {"safe": config.benign_steps * config.benign_rows, "unsafe": 0}
    if name == "abliteration":
        most = dict.fromkeys(("safe", "unsafe"), config.direction_prompts)
    examples = run.directory.training_examples
    return pd.concat(
        [_evenly(examples[examples["label"] == label], number) for label, number in most.items() if number]
    )
