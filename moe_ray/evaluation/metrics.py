"""Figures of held-out answers: rates and losses with n and 95% interval, and what changed between two models."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pandas as pd

from moe_ray.errors import InputError
from moe_ray.evaluation.answering_order import ROUTINGS
from moe_ray.evaluation.intervals import clustered_mean, clustered_rate, paired_difference
from moe_ray.evaluation.routing_drift import routing_drift
from moe_ray.routing.counts import RoutingCounts

UNCATEGORISED = "uncategorised"


def summarise(
    answers: pd.DataFrame,
    *,
    neutral: pd.DataFrame | None = None,
    routing: RoutingCounts | None = None,
    routing_before: RoutingCounts | None = None,
) -> dict[str, Any]:
    """What the held-out answers say: rates and losses with n and 95% interval, from stored tables alone.

    Args:
        answers: rows with `label`, `category`, `batch_idx`, `routing`, `messages`, `pair`, `refused` (bool),
            `target_loss` (summed nats) and `target_tokens`.
        neutral: rows with `loss` (summed nats) and `num_tokens`, one per text.
        routing: counts of the held-out prompts under natural routing; `in_batch_idx` is a prompt's position among the
            natural answers.
        routing_before: the same of the model before the repair.

    Returns:
        `unsafe_refusal_rate` and `safe_refusal_rate` (value, n, low, high) and `target_loss` (nats per token over all target
        tokens: value, n, low, high, num_tokens), under natural routing; `per_category` and `per_batch`, each a mapping to
        the same three; `masked` and `union`, all of that under those kinds of routing; `neutral_loss`, as `target_loss`;
        `routing_drift`, from the function of that name. What was not measured is None.
    """
    natural = answers[answers["routing"] == "natural"]
    drift = None
    if routing is not None and routing_before is not None:
        drift = routing_drift(
            routing_before, routing, clusters=prompt_clusters(natural).to_numpy()[routing.in_batch_idx]
        )
    return {
        **_summary_of(natural),
        **{kind: _block(answers, kind, _summary_of) for kind in ROUTINGS[1:]},
        "neutral_loss": None if neutral is None else _loss(neutral["loss"], neutral["num_tokens"], None),
        "routing_drift": drift,
    }


def _block(answers: pd.DataFrame, routing: str, of: Callable[[pd.DataFrame], dict[str, Any]]) -> dict[str, Any] | None:
    chosen = answers[answers["routing"] == routing]
    return of(chosen) if len(chosen) else None


def _summary_of(answers: pd.DataFrame) -> dict[str, Any]:
    rows = answers.assign(cluster=prompt_clusters(answers))
    return {**_figures(rows), **_divided(rows, _figures)}


def _divided(rows: pd.DataFrame, of: Callable[[pd.DataFrame], dict[str, Any]]) -> dict[str, Any]:
    """The figures of each category and each batch."""
    per_category = rows.groupby(rows["category"].replace("", UNCATEGORISED), sort=True)
    return {
        "per_category": {str(name): of(group) for name, group in per_category},
        "per_batch": {str(name): of(group) for name, group in rows.groupby("batch_idx", sort=True)},
    }


def _figures(rows: pd.DataFrame) -> dict[str, Any]:
    figures: dict[str, Any] = {}
    for label in ("unsafe", "safe"):
        labelled = rows[rows["label"] == label]
        figures[f"{label}_refusal_rate"] = clustered_rate(labelled["refused"], labelled["cluster"].to_numpy()).as_dict()
    scored = rows[rows["target_tokens"] > 0]
    figures["target_loss"] = _loss(scored["target_loss"], scored["target_tokens"], scored["cluster"])
    return figures


def _loss(summed: pd.Series, tokens: pd.Series, clusters: pd.Series | None) -> dict[str, Any]:
    ids = None if clusters is None else clusters.to_numpy()
    per_token = (summed / tokens).to_numpy(dtype=np.float64)
    return clustered_mean(per_token, weights=tokens.to_numpy(), clusters=ids).as_dict() | {
        "num_tokens": int(tokens.sum())
    }


def paired_changes(
    before: pd.DataFrame,
    after: pd.DataFrame,
    *,
    neutral_before: pd.DataFrame | None = None,
    neutral_after: pd.DataFrame | None = None,
) -> dict[str, Any]:
    """After minus before on the same held-out examples, as paired differences with n and 95% interval.

    Args:
        before: answers of one model.
        after: answers of the other to the same examples, under the same kinds of routing.
        neutral_before: losses on neutral text, as `summarise` takes them.
        neutral_after: of the other model on the same texts.

    Returns:
        the keys of `summarise` but `routing_drift`; each figure is (value, n, low, high).

    Raises:
        InputError: the two are not about the same examples.
    """
    keys = ["routing", "id"]
    values = ["refused", "target_loss"]
    if len(before) != len(after) or not before.set_index(keys).index.isin(after.set_index(keys).index).all():
        raise InputError("before and after hold answers to different examples; evaluate both on the same ones")
    rows = before.merge(after[keys + values], on=keys, suffixes=("_before", "_after"), validate="one_to_one")
    neutral = None
    if neutral_before is not None and neutral_after is not None:
        neutral = _loss_change(neutral_before["loss"], neutral_after["loss"], neutral_before["num_tokens"], None)
    return {
        **_change_of(rows[rows["routing"] == "natural"]),
        **{kind: _block(rows, kind, _change_of) for kind in ROUTINGS[1:]},
        "neutral_loss": neutral,
    }


def _change_of(rows: pd.DataFrame) -> dict[str, Any]:
    clustered = rows.assign(cluster=prompt_clusters(rows))
    return {**_changes(clustered), **_divided(clustered, _changes)}


def _changes(rows: pd.DataFrame) -> dict[str, Any]:
    changes: dict[str, Any] = {}
    for label in ("unsafe", "safe"):
        labelled = rows[rows["label"] == label]
        refused = [labelled[f"refused_{when}"].to_numpy(dtype=bool) for when in ("before", "after")]
        changes[f"{label}_refusal_rate"] = paired_difference(
            *refused, clusters=labelled["cluster"].to_numpy()
        ).as_dict()
    scored = rows[rows["target_tokens"] > 0]
    losses = (scored["target_loss_before"], scored["target_loss_after"])
    changes["target_loss"] = _loss_change(*losses, scored["target_tokens"], scored["cluster"])
    return changes


def _loss_change(before: pd.Series, after: pd.Series, tokens: pd.Series, clusters: pd.Series | None) -> dict[str, Any]:
    per_token = [(summed.to_numpy() / tokens.to_numpy()).astype(np.float64) for summed in (before, after)]
    ids = None if clusters is None else clusters.to_numpy()
    return paired_difference(*per_token, clusters=ids, weights=tokens.to_numpy()).as_dict()


def prompt_clusters(rows: pd.DataFrame) -> pd.Series:
    """A number per row, equal where rows share a pair or have the same prompt: such answers are not independent.

    Args:
        rows: with `messages` and `pair`.
    """
    parent: dict[str, str] = {}

    def root(name: str) -> str:
        while parent.setdefault(name, name) != name:
            parent[name] = name = parent[parent[name]]
        return name

    roots = []
    for messages, pair in zip(rows["messages"], rows["pair"], strict=True):
        prompt = f"prompt {messages}"
        if isinstance(pair, str) and pair:
            parent[root(prompt)] = root(f"pair {pair}")
        roots.append(prompt)
    return pd.Series(pd.factorize(pd.Series([root(name) for name in roots], dtype=object))[0], index=rows.index)
