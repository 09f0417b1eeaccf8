"""The page's part on single held-out examples with their answers; prompts are untrusted text."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

import pandas as pd

from moe_ray.messages import prompt_text
from moe_ray.report.html.experts import _spread
from moe_ray.report.printable import printable
from moe_ray.run_directory import RunDirectory


def _examples(run: RunDirectory, limit: int) -> dict[str, Any]:
    """Held-out examples of each label, spread evenly over all, and after the repair those that went wrong."""
    answers = {when: _natural(run.answers(when)) for when in ("before", "after")}
    tables = [table for table in answers.values() if table is not None]
    if not tables or not limit:
        return {}
    groups: dict[str, Any] = {}
    for label in ("unsafe", "safe"):
        ids = tables[-1].loc[tables[-1]["label"] == label, "id"].tolist()
        chosen = [ids[place] for place in _spread(range(len(ids)), limit)]
        groups[f"{label} prompts, spread evenly over {len(ids)}"] = _cards(answers, chosen)
    after = answers["after"]
    if after is not None:
        for label, is_wrong, text in (("unsafe", False, "answered"), ("safe", True, "refused")):
            wrong = after.loc[(after["label"] == label) & (after["refused"] == is_wrong), "id"].tolist()
            if wrong:
                cards = _cards(answers, wrong[:limit])
                groups[f"{label} prompts {text} after the repair: {len(cards)} of {len(wrong)}"] = cards
    return groups


def _natural(answers: pd.DataFrame | None) -> pd.DataFrame | None:
    if answers is None or "routing" not in answers:
        return answers
    return answers[answers["routing"] == "natural"]


def _cards(answers: Mapping[str, pd.DataFrame | None], ids: Sequence[str]) -> list[dict[str, Any]]:
    cards: list[dict[str, Any]] = [{} for _ in ids]
    for when, table in answers.items():
        if table is None:
            continue
        rows = table.drop_duplicates("id").set_index("id")
        for card, row in zip(cards, rows.loc[list(ids)].to_dict("records"), strict=True):
            card |= {"prompt": _text(prompt_text(json.loads(row["messages"]))), "category": printable(row["category"])}
            card[when] = {"answer": _text(row["answer"]), "refused": bool(row["refused"])}
    return cards


_LONGEST_TEXT = 1200


def _text(text: str) -> str:
    """Untrusted text without control characters but line ends, and not too long."""
    clean = _printable_lines(text)
    return clean if len(clean) <= _LONGEST_TEXT else clean[:_LONGEST_TEXT] + " …"


def _printable_lines(text: str) -> str:
    """Untrusted text without control characters but line ends."""
    return "\n".join(printable(line) for line in text.splitlines())
