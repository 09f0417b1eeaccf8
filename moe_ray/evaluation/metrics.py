"""Figures of held-out answers: rates and losses with n and 95% interval, and what changed between two models."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pandas as pd

from moe_ray.errors import InputError
from moe_ray.evaluation.answering_order import ROUTINGS
from moe_ray.evaluation.first_token import first_token_divergence
from moe_ray.evaluation.intervals import clustered_mean, paired_difference
from moe_ray.evaluation.routing_drift import routing_drift
from moe_ray.evaluation.samples import SAMPLE, with_sample
from moe_ray.evaluation.verdict_rates import rate_changes, rates_of
from moe_ray.routing.counts import RoutingCounts

UNCATEGORISED = "uncategorised"


def summarise(
    answers: pd.DataFrame,
    *,
    neutral: pd.DataFrame | None = None,
    routing: RoutingCounts | None = None,
    routing_before: RoutingCounts | None = None,
    first_tokens: pd.DataFrame | None = None,
    first_tokens_before: pd.DataFrame | None = None,
) -> dict[str, Any]:
    """What the held-out answers say: rates and losses with n and 95% interval, from stored tables alone.

    Args:
        answers: rows with `id`, `label`, `category`, `batch_idx`, `routing`, `messages`, `pair`, `verdict`, `refused`
            (bool), `target_loss` (summed nats) and `target_tokens`; with `sample` where a prompt has several answers.
        neutral: rows with `loss` (summed nats) and `num_tokens`, one per text.
        routing: counts of the held-out prompts under natural routing; `in_batch_idx` is a prompt's position among the
            natural answers.
        routing_before: the same of the model before the repair.
        first_tokens: what the model says first to safe prompts, from `first_token_table`.
        first_tokens_before: the same of the model before the repair.

    Returns:
        the rates of `verdict_rates.RATES`, such as `unsafe_refusal_rate` and `safe_cost_rate` (value, n, low, high), and
        `target_loss` (nats per token over all target tokens: value, n, low, high, num_tokens), under natural routing;
        `per_category` and `per_batch`, each a mapping to the same; `masked` and `union`, all of that under those kinds of
        routing; `neutral_loss`, as `target_loss`; `first_token_kl` (nats), how far the first answer token of safe prompts
        moved; `routing_drift`, from the function of that name. What was not measured is None.
    """
    answers = with_sample(answers)
    natural = answers[answers["routing"] == "natural"]
    first = natural[natural[SAMPLE] == 0]
    drift = None
    if routing is not None and routing_before is not None:
        drift = routing_drift(routing_before, routing, clusters=prompt_clusters(first).to_numpy()[routing.in_batch_idx])
    divergence = None
    if first_tokens is not None and first_tokens_before is not None:
        kl = first_token_divergence(first_tokens_before, first_tokens)
        clusters = first.assign(cluster=prompt_clusters(first)).set_index("id")["cluster"].loc[kl.index]
        divergence = clustered_mean(kl.to_numpy(), clusters=clusters.to_numpy()).as_dict()
    return {
        **_summary_of(natural),
        **{kind: _block(answers, kind, _summary_of) for kind in ROUTINGS[1:]},
        "neutral_loss": None if neutral is None else _loss(neutral["loss"], neutral["num_tokens"], None),
        "first_token_kl": divergence,
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
    figures: dict[str, Any] = rates_of(rows)
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
        the keys of `summarise` but `first_token_kl` and `routing_drift`, which are changes themselves; each figure is
        (value, n, low, high).

    Raises:
        InputError: the two are not about the same examples.
    """
    before, after = with_sample(before), with_sample(after)
    keys = ["routing", "id", SAMPLE]
    values = [name for name in ("verdict", "refused", "judge", "target_loss") if name in after]
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
    changes: dict[str, Any] = rate_changes(rows)
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
