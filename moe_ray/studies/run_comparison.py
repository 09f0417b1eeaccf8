"""Finished runs beside one another: figures paired by example, how alike their experts are, what was set otherwise."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import pandas as pd

from moe_ray.config.io import flatten
from moe_ray.errors import InputError
from moe_ray.evaluation.metrics import paired_changes, summarise
from moe_ray.run_directory import RunDirectory, When

_NOT_COMPARED = ("run_dir", "cache_dir")
_FIGURES = ("unsafe_refusal_rate", "safe_refusal_rate", "target_loss")


@dataclass(frozen=True, kw_only=True)
class ComparedRun:
    """A run beside the first one.

    Attributes:
        name: of the run: the last part of its address, or more of it where that is not enough to tell it by.
        when: whether its answers are of the repaired model (`after`) or of the base (`before`).
        figures: its own `unsafe_refusal_rate`, `safe_refusal_rate` and `target_loss`, each with n and 95% interval.
        minus_first: the same of this run minus the first, paired by example; None = the first run itself.
        num_shared: held-out examples that both have; the differences are about them.
        num_other: held-out examples that only one of the two has.
        num_union: experts that are unsafe in at least one batch.
        jaccard: of its union with the first run's; None = the models have other layers or experts.
        set_otherwise: settings whose values differ from the first run's, and this run's values.
    """

    name: str
    when: When
    figures: dict[str, Any]
    minus_first: dict[str, Any] | None
    num_shared: int
    num_other: int
    num_union: int
    jaccard: float | None
    set_otherwise: dict[str, Any]


def compare_runs(runs: Sequence[RunDirectory]) -> list[ComparedRun]:
    """The runs in the order given, each beside the first.

    Args:
        runs: two or more; each identified, and evaluated at least before the repair.

    Raises:
        InputError: there are fewer than two, one was not evaluated, or two have no held-out example in common.
    """
    if len(runs) < 2:
        raise InputError(f"got {len(runs)} run, expected two or more to compare")
    answered = [_answers(run) for run in runs]
    names = _names([run.folder.url for run in runs])
    first, first_answers = runs[0], answered[0][1]
    settings = flatten(first.config)
    compared = []
    for place, (run, name, (when, answers)) in enumerate(zip(runs, names, answered, strict=True)):
        own, theirs = _shared(answers, first_answers, name, names[0])
        measured = summarise(answers)
        change = None if place == 0 else paired_changes(theirs, own)
        other = len(answers) + len(first_answers) - 2 * len(own)
        compared.append(
            ComparedRun(
                name=name,
                when=when,
                figures={key: measured[key] for key in _FIGURES},
                minus_first=None if change is None else {key: change[key] for key in _FIGURES},
                num_shared=len(own),
                num_other=other,
                num_union=len(run.masks.union_experts),
                jaccard=_jaccard(run, first),
                set_otherwise={
                    key: value
                    for key, value in flatten(run.config).items()
                    if key not in _NOT_COMPARED and value != settings[key]
                },
            )
        )
    return compared


def _answers(run: RunDirectory) -> tuple[When, pd.DataFrame]:
    """The run's natural answers, of the repaired model where there is one."""
    whens: tuple[When, When] = ("after", "before")
    for when in whens:
        answers = run.answers(when)
        if answers is not None:
            return when, answers[answers["routing"] == "natural"].drop_duplicates("id")
    raise InputError(f"{run.folder.url} holds no held-out answers; run `moe-ray evaluate {run.folder.url}` first")


def _shared(own: pd.DataFrame, first: pd.DataFrame, name: str, first_name: str) -> tuple[pd.DataFrame, pd.DataFrame]:
    """The rows of both about the same examples: equal in id, label and prompt."""
    keys = ["id", "label", "messages"]
    common = own[keys].merge(first[keys], on=keys)["id"]
    if common.empty:
        raise InputError(
            f"{name} and {first_name} have no held-out example in common; compare runs on the same prompts and seed"
        )
    return own[own["id"].isin(common)], first[first["id"].isin(common)]


def _jaccard(run: RunDirectory, first: RunDirectory) -> float | None:
    one, other = run.masks, first.masks
    if one.layers != other.layers or one.union.shape != other.union.shape:
        return None
    either = int((one.union | other.union).sum())
    return int((one.union & other.union).sum()) / either if either else 1.0


def _names(urls: Sequence[str]) -> list[str]:
    """As many of the last parts of each address as tell them apart."""
    parts = [url.rstrip("/").split("/") for url in urls]
    for depth in range(1, max(map(len, parts)) + 1):
        names = ["/".join(part[-depth:]) for part in parts]
        if len(set(names)) == len(names):
            return names
    return list(urls)
