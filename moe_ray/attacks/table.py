"""What attacks did, as figures: rates with n and 95% interval for each, before and after the repair, paired by prompt."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pandas as pd

from moe_ray.attacks.names import NO_ATTACK
from moe_ray.evaluation.intervals import clustered_rate, paired_difference
from moe_ray.evaluation.metrics import prompt_clusters

WHENS = ("before", "after")
LABELS = ("unsafe", "safe")


def attack_figures(answers: pd.DataFrame, *, what: str = "refused") -> dict[str, dict[str, Any]]:
    """The rate of a verdict under every attack.

    Args:
        answers: a row per attack, model and prompt: `attack` (`none` among them), `when` (`before` or `after` the repair),
            `id`, `label`, `messages`, `pair` and the verdict, a bool.
        what: the verdict's column.

    Returns:
        per attack and label `unsafe_before`, `unsafe_after`, `unsafe_change` (after minus before, on the same prompts),
        `unsafe_lost` (the repaired model's rate under the attack minus its rate without one, on the same prompts), and the
        same of `safe`; each with value, n, low and high.
    """
    # By prompt and pair, the same in every attack: rows have the messages as they were before it.
    rows = answers.assign(cluster=prompt_clusters(answers))
    keyed = {key: group.set_index("id") for key, group in rows.groupby(["attack", "when", "label"], sort=False)}
    figures: dict[str, dict[str, Any]] = {}
    for attack in dict.fromkeys(rows["attack"]):
        found: dict[str, Any] = {}
        for label in LABELS:
            before, after = (keyed.get((attack, when, label)) for when in WHENS)
            plain = keyed.get((NO_ATTACK, "after", label))
            for when, group in (("before", before), ("after", after)):
                found[f"{label}_{when}"] = _rate(group, what)
            found[f"{label}_change"] = _difference(before, after, what)
            if attack != NO_ATTACK:
                found[f"{label}_lost"] = _difference(plain, after, what)
        figures[str(attack)] = found
    return figures


def _rate(rows: pd.DataFrame | None, what: str) -> Mapping[str, Any] | None:
    if rows is None:
        return None
    return clustered_rate(rows[what], rows["cluster"].to_numpy()).as_dict()


def _difference(first: pd.DataFrame | None, second: pd.DataFrame | None, what: str) -> Mapping[str, Any] | None:
    """Of the prompts that both were asked."""
    if first is None or second is None:
        return None
    both = first.index.intersection(second.index)
    values = [rows.loc[both, what].to_numpy(dtype=bool) for rows in (first, second)]
    return paired_difference(*values, clusters=first.loc[both, "cluster"].to_numpy()).as_dict()
