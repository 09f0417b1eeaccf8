"""Stage `evaluate`: held-out answers before and after the repair, and their figures.

Answers and figures are two stages, so that another judge, or one that failed, costs no answer.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd

from moe_ray.evaluation.judges import judge_identity
from moe_ray.evaluation.metrics import paired_changes, summarise
from moe_ray.orchestration.jobs.answer import answer, read_answers
from moe_ray.orchestration.jobs.answer_job import AnswerJob
from moe_ray.orchestration.stages.answering import judged
from moe_ray.orchestration.stages.context import Context
from moe_ray.routing.count_tables import counts_digest
from moe_ray.run_directory import ANSWERS, FINETUNE, IDENTIFY, PARTS, PROMPTS, VERDICTS, When, answers_of, figures_of
from moe_ray.storage.fingerprint import content_hash, frame_hash
from moe_ray.storage.folder import Folder
from moe_ray.storage.stage import MADE, Outcome, Stage


def answer_held_out(run: Context, when: When) -> Outcome:
    """Held-out answers, losses and routing of the model `before` or `after` the repair, and its losses on neutral text.

    Makes `answers`, which are not judged here.
    """
    config, after = run.config.evaluate, when == "after"
    is_masked = set(config.routing) != {"natural"}
    settings = run.settings("answers")
    # The file counts by its texts, as the input `neutral`, and not by its name.
    settings.pop("evaluate.neutral_file")
    inputs = {
        "test": run.made(PROMPTS, "test"),
        "experts": run.made(FINETUNE, "experts") if after else None,
        "masks": run.made(IDENTIFY, "masks") if is_masked else None,
        # What the base model says first is what the repaired one is compared at.
        "before": run.made(answers_of("before"), "answers") if after else None,
        "neutral": content_hash(run.prompts.neutral),
        **settings,
        "finetune.short_layers": run.config.finetune.short_layers if is_masked else None,
        **run.checkpoint,
        **run.numerics(config.gpus_per_actor, engine=config.engine),
    }

    def work(folder: Folder) -> dict[str, Any]:
        job = AnswerJob(
            model=run.model,
            config=config,
            run_url=run.directory.folder.url,
            parts=f"{answers_of(when)}/{PARTS}",
            adapter=FINETUNE if after else None,
            masks=folder_of_masks(run, when) if is_masked else None,
            count=True,
            first_of=f"{answers_of('before')}/{PARTS}" if after and "natural" in config.routing else None,
            short_layers=run.config.finetune.short_layers,
        )
        done = answer(
            run.directory.test,
            job,
            what=f"answers {when}",
            routing=config.routing,
            neutral=run.prompts.neutral,
            models=run.models,
        )
        hashes = [frame_hash(table) for table in (done.answers, done.neutral) if table is not None]
        hashes += [] if done.routing is None else [str(counts_digest(done.routing))]
        hashes += [] if done.first_tokens is None else [_digest_of_first_tokens(done.first_tokens)]
        return {"answers": len(done.answers), MADE: {"answers": content_hash(hashes)}}

    return run.do(Stage(name=answers_of(when), inputs=inputs, work=work))


def _digest_of_first_tokens(table: pd.DataFrame) -> str:
    """By value and in the order of ids; parts come in any order."""
    ordered = table.sort_values("id")
    return content_hash([ordered["id"].tolist(), [np.asarray(row).tolist() for row in ordered["log_probs"]]])


def folder_of_masks(run: Context, when: When) -> str:
    """The folder of the masks to route through. After several rounds they are those of the round that was kept."""
    return FINETUNE if when == "after" and run.config.rounds.max_rounds > 1 else IDENTIFY


def evaluate(run: Context, when: When) -> Outcome:
    """Verdicts and figures on held-out examples, `before` or `after` the repair; after it, also what changed.

    What changed needs the figures before the repair, so these are made first where they are not there yet.
    """
    if when == "after" and figures_of("before") not in run.outcomes:
        evaluate(run, "before")
    source = answer_held_out(run, when).folder.sub(PARTS)

    def work(folder: Folder) -> dict[str, Any]:
        done = read_answers(source)
        with_verdicts = judged(run, done.answers, folder.sub(VERDICTS), f"verdicts {when}").drop(columns="place")
        folder.write_table(ANSWERS, with_verdicts)
        made = {MADE: {"figures": frame_hash(with_verdicts)}}
        if when == "before":
            return {"metrics": summarise(with_verdicts, neutral=done.neutral, routing=done.routing), **made}
        first = read_answers(run.directory.sub(answers_of("before")).sub(PARTS))
        metrics = summarise(
            with_verdicts,
            neutral=done.neutral,
            routing=done.routing,
            routing_before=first.routing,
            first_tokens=done.first_tokens,
            first_tokens_before=first.first_tokens,
        )
        before = run.outcomes[figures_of("before")].folder.read_frame(ANSWERS)
        change = paired_changes(before, with_verdicts, neutral_before=first.neutral, neutral_after=done.neutral)
        return {"metrics": metrics, "change": change, **made}

    inputs = {
        "answers": run.made(answers_of(when), "answers"),
        "before": run.made(figures_of("before"), "figures") if when == "after" else None,
        "judge": judge_identity(run.config.evaluate),
    }
    return run.do(Stage(name=figures_of(when), inputs=inputs, work=work))
