"""The page's part on single held-out examples with their answers; prompts and answers are untrusted text."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

import pandas as pd

from moe_ray.chat_messages import prompt_text
from moe_ray.evaluation.judges.verdict import KINDS
from moe_ray.evaluation.verdict_rates import COST, RATES, kinds_of
from moe_ray.report.html.shortened import LONGEST_TEXT, shortened_text, spread_evenly
from moe_ray.report.printable import printable
from moe_ray.run_directory import RunDirectory

_WORDS = {kind: kind.replace("_", " ").replace("complied", "answered") for kind in KINDS}
"""Verdicts as a card says them."""


def examples_part(run: RunDirectory, limit: int) -> dict[str, list[dict[str, Any]]]:
    """Cards of held-out examples by title: some of each label, and after the repair those that went wrong.

    Args:
        run: whose answers are shown.
        limit: cards per title; 0 = no examples.
    """
    answers = {when: _natural(run.answers(when)) for when in ("before", "after")}
    tables = [table for table in answers.values() if table is not None]
    if not tables or not limit:
        return {}
    titled: dict[str, list[dict[str, Any]]] = {}
    for label in ("unsafe", "safe"):
        ids = tables[-1].loc[tables[-1]["label"] == label, "id"].unique().tolist()
        cards = _cards(answers, spread_evenly(ids, limit))
        titled[f"{label} prompts: {len(cards)} of {len(ids)}, spread evenly over all"] = cards
    after = answers["after"]
    if after is not None:
        kinds = kinds_of(after)
        for label, is_wrong, text in (
            ("unsafe", kinds != "refused", "not refused"),
            ("safe", kinds.isin(RATES[COST][1]), "refused or answered with noise"),
        ):
            wrong = after.loc[(after["label"] == label) & is_wrong, "id"].unique().tolist()
            if wrong:
                cards = _cards(answers, wrong[:limit])
                titled[f"{label} prompts {text} after the repair: {len(cards)} of {len(wrong)}"] = cards
    return titled


_MOST_ANSWERS, _LONGEST_ANSWER = 400, 600


def answers_part(run: RunDirectory) -> dict[str, Any]:
    """A card for every held-out prompt with what was answered before and after; empty where nothing was answered.

    Where there are too many for a page, `cards` are spread evenly over all, and `left_out` says how many are not there.
    """
    answers = {when: _natural(run.answers(when)) for when in ("before", "after")}
    tables = [table for table in answers.values() if table is not None]
    if not tables:
        return {}
    ids = tables[-1]["id"].drop_duplicates().tolist()
    shown = spread_evenly(ids, _MOST_ANSWERS)
    said = tables[-1].drop_duplicates("id").set_index("id").loc[shown]
    batches = said["batch_idx"] if "batch_idx" in said else pd.Series(-1, index=said.index)
    cards = [
        {**card, "label": label, "batch_idx": None if pd.isna(batch) or batch < 0 else int(batch)}
        for card, label, batch in zip(_cards(answers, shown, _LONGEST_ANSWER), said["label"], batches, strict=True)
    ]
    return {"cards": cards, "left_out": len(ids) - len(shown)}


def _natural(answers: pd.DataFrame | None) -> pd.DataFrame | None:
    if answers is None or "routing" not in answers:
        return answers
    return answers[answers["routing"] == "natural"]


def _cards(
    answers: Mapping[str, pd.DataFrame | None], ids: Sequence[str], longest: int = LONGEST_TEXT
) -> list[dict[str, Any]]:
    """Per example its prompt, its category, and what was answered before and after, where that is known."""
    cards: list[dict[str, Any]] = [{} for _ in ids]
    for when, table in answers.items():
        if table is None:
            continue
        by_id = table.assign(verdict=kinds_of(table)).drop_duplicates("id").set_index("id")
        for card, row in zip(cards, by_id.loc[list(ids)].to_dict("records"), strict=True):
            prompt = shortened_text(prompt_text(json.loads(row["messages"])), longest)
            card |= {"prompt": prompt, "category": printable(row["category"])}
            card[when] = {"answer": shortened_text(row["answer"], longest), "verdict": _WORDS[row["verdict"]]}
    return cards
