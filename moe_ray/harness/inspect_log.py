"""Judged held-out answers as a log of inspect_ai, which `inspect view` opens."""

from __future__ import annotations

import json
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pandas as pd

from moe_ray.harness.extra import imported, require

SCORER = "refused"

_METADATA = ("label", "category", "routing", "judge", "verdict", "thought")


def write_inspect_log(
    answers: pd.DataFrame, file: Path, *, model: str, when: str, metrics: Mapping[str, Any], about: Mapping[str, Any]
) -> None:
    """Writes one `.eval` file: a sample per answer, scored 1 where it refuses.

    Args:
        answers: of one model: `id`, `label`, `category`, `messages` (JSON), `routing`, `answer`, `refused`, `judge`, and
            what the judge said; `sample`, `thought` and `verdict` where they are known.
        file: to write; ends in `.eval`.
        model: path or name of the base model.
        when: `before` or `after` the repair.
        metrics: figures with `value`, such as the refusal rates.
        about: what else is known of the run, as plain values.

    Raises:
        InputError: inspect_ai is not installed.
    """
    require("inspect_ai", "a log of inspect_ai")
    log, inspect_model, scorer = (imported(f"inspect_ai.{name}") for name in ("log", "model", "scorer"))
    name = f"moe-ray/{model} ({when} the repair)"
    samples = [
        log.EvalSample(
            id=f"{row['id']}/{row['routing']}",
            epoch=int(row.get("sample", 0)) + 1,
            input=[_message(inspect_model, message) for message in json.loads(row["messages"])],
            messages=[_message(inspect_model, message) for message in json.loads(row["messages"])]
            + [inspect_model.ChatMessageAssistant(content=row["answer"])],
            target=row["label"],
            output=inspect_model.ModelOutput.from_content(name, row["answer"]),
            scores={
                SCORER: scorer.Score(
                    value=int(row["refused"]), answer=row["answer"], explanation=str(row.get("judge_said") or "")
                )
            },
            # Versions of inspect_ai differ in where a message keeps its reasoning, so a thought is beside it.
            metadata={key: row[key] for key in _METADATA if key in row},
        )
        for row in answers.to_dict("records")
    ]
    figures = {
        key: log.EvalMetric(name=key, value=figure["value"])
        for key, figure in metrics.items()
        if isinstance(figure, Mapping) and isinstance(figure.get("value"), int | float)
    }
    now = datetime.now(UTC).isoformat()
    written = log.EvalLog(
        status="success",
        eval=log.EvalSpec(
            created=now,
            task=f"moe-ray-{when}",
            dataset=log.EvalDataset(name="held out", samples=len(samples)),
            model=name,
            config=log.EvalConfig(),
            metadata=dict(about),
        ),
        results=log.EvalResults(
            total_samples=len(samples),
            completed_samples=len(samples),
            scores=[log.EvalScore(name=SCORER, scorer=SCORER, metrics=figures)],
        ),
        stats=log.EvalStats(started_at=now, completed_at=now),
        samples=samples,
    )
    log.write_eval_log(written, str(file), format="eval")


def _message(inspect_model: Any, message: Mapping[str, str]) -> Any:
    kinds = {
        "system": inspect_model.ChatMessageSystem,
        "assistant": inspect_model.ChatMessageAssistant,
    }
    return kinds.get(message["role"], inspect_model.ChatMessageUser)(content=message["content"])
