"""Evaluation on held-out examples: answers and losses of a model, their summary, and what changed between two models.

Each held-out example is *held against* one batch: under masked routing it is routed through that batch's mask, and under
either routing it counts for that batch. Nothing is a bare number: each has its n and a 95% interval in which the forms of
one request count once.

Shape suffixes: L MoE layers, E experts.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from moe_ray.answering import answer_rows
from moe_ray.config import EvaluateConfig
from moe_ray.errors import InputError
from moe_ray.judges import judge_answers, make_judge
from moe_ray.masking import route_through
from moe_ray.moe_layers import find_moe_layers
from moe_ray.rates import clustered_mean, clustered_rate, jackknife, paired_difference
from moe_ray.routing import RoutingCounts, concat_counts, counting
from moe_ray.selection import ExpertMasks, ShortLayers, restrict_routing

INPUT_COLUMNS = ("id", "label", "category", "batch_idx", "messages", "target", "target_complete", "pair")
"""What `answer_examples` needs of a held-out example; `batch_idx` is the batch it is held against."""

FIGURES = ("unsafe_refusal_rate", "safe_refusal_rate", "target_loss")
"""What a summary says of any set of answers."""

UNCATEGORISED = "uncategorised"


def hold_against(examples: pd.DataFrame, batches: pd.DataFrame) -> pd.Series:
    """The `batch_idx` that each held-out example is held against.

    An example goes to a batch of its own category, to all batches where none is of its category, each label in turn over
    those batches in ascending order. The two examples of a pair go to the same batch. Deterministic.

    Args:
        examples: held-out rows with `label`, `category`, `pair`.
        batches: the stored batches, one row per example, with `batch_idx`, `label`, `category`.
    """
    unsafe = batches[batches["label"] == "unsafe"]
    own = {str(name): sorted(rows["batch_idx"].unique()) for name, rows in unsafe.groupby("category")}
    every = sorted(batches["batch_idx"].unique())
    turns: dict[tuple[str, str], int] = defaultdict(int)
    of_pair: dict[str, int] = {}
    chosen = []
    for label, category, pair in examples[["label", "category", "pair"]].itertuples(index=False):
        if isinstance(pair, str) and pair in of_pair:
            chosen.append(of_pair[pair])
            continue
        candidates = own.get(category, every)
        key = ("pair" if isinstance(pair, str) else label, category if category in own else "")
        batch_idx = int(candidates[turns[key] % len(candidates)])
        turns[key] += 1
        if isinstance(pair, str):
            of_pair[pair] = batch_idx
        chosen.append(batch_idx)
    return pd.Series(chosen, index=examples.index, dtype=np.int64, name="batch_idx")


def rows_to_answer(frame: pd.DataFrame, routing: str) -> pd.DataFrame:
    """One row per example and kind of routing, with `routing` (`natural` or `masked`) and `place` in the frame."""
    kinds = ("natural", "masked") if routing == "both" else (routing,)
    placed = frame.assign(place=np.arange(len(frame)))
    return pd.concat([placed.assign(routing=kind) for kind in kinds], ignore_index=True)


@dataclass(frozen=True, kw_only=True)
class Answered:
    """Answers without verdicts, and the routing counts of the prompts under natural routing (None = not counted)."""

    answers: pd.DataFrame
    routing: RoutingCounts | None


def answer_examples(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    frame: pd.DataFrame,
    config: EvaluateConfig,
    masks: ExpertMasks | None = None,
) -> pd.DataFrame:
    """Answers with verdicts and target losses: the frame that `summarise` and `compare` take.

    Args:
        model: in memory; its training mode is restored afterwards.
        tokenizer: its tokenizer.
        frame: held-out examples, a row each, with `INPUT_COLUMNS`.
        config: `routing`, `max_new_tokens`, `rows_per_forward` and the judge.
        masks: of the batches that the examples are held against; needed where `routing` is not natural.

    Returns:
        per example and kind of routing a row with `INPUT_COLUMNS`, `routing` (`natural` or `masked`), `answer`,
        `ended`, `target_loss` (summed nats), `target_tokens`, `refused`, `judge`, `judge_score`, `judge_said`.

    Raises:
        InputError: masked routing without masks, or a judge that cannot be had.
    """
    judge = make_judge(config, device=model.device)
    answered = answer_and_count(model, tokenizer, rows_to_answer(frame, config.routing), config, masks)
    return judge_answers(answered.answers, judge)


def answer_and_count(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    rows: pd.DataFrame,
    config: EvaluateConfig,
    masks: ExpertMasks | None = None,
    *,
    count: bool = False,
    short_layers: ShortLayers = "allowed_only",
) -> Answered:
    """Answers and target losses of the rows, and where asked for the routing of those under natural routing.

    A batch without unsafe experts has nothing to route through, so its examples route naturally.

    Args:
        model: its training mode is restored afterwards.
        tokenizer: its tokenizer.
        rows: from `rows_to_answer`.
        config: `max_new_tokens` and `rows_per_forward`.
        masks: needed where a row is masked.
        count: count the prompts' routing, in the same forward passes that score the targets.
        short_layers: for masked rows, the policy that training has (`train.short_layers`).

    Raises:
        InputError: a row is masked and there are no masks.
    """
    if masks is None and (rows["routing"] == "masked").any():
        raise InputError("masked routing needs the batches' expert masks; give them, or set evaluate.routing=natural")
    was_training = model.training
    model.eval()
    parts, counted = [], []
    try:
        for (routing, batch_idx), positions in _groups(rows):
            group = rows.iloc[positions]
            mask = masks[batch_idx] if masks is not None and routing == "masked" else None
            if mask is not None:
                num_experts_per_tok = find_moe_layers(model).num_experts_per_tok
                mask = restrict_routing(mask, num_experts_per_tok=num_experts_per_tok, short_layers=short_layers)
            through = route_through(model, mask) if mask is not None and mask.any() else nullcontext()
            counter = counting(model) if count and routing == "natural" else nullcontext()
            with through, counter as active:
                answers, counts = answer_rows(model, tokenizer, group, config, active)
            parts.append(answers)
            counted += [] if counts is None else [counts]
    finally:
        model.train(was_training)
    answers = pd.concat(parts).sort_index()
    return Answered(answers=answers, routing=concat_counts(counted) if counted else None)


def _groups(rows: pd.DataFrame) -> Iterator[tuple[tuple[str, int], list[int]]]:
    """Rows that can run together, by position: all natural ones, and the masked ones of a batch."""
    groups: dict[tuple[str, int], list[int]] = defaultdict(list)
    for position, (routing, batch_idx) in enumerate(zip(rows["routing"], rows["batch_idx"], strict=True)):
        groups[routing, int(batch_idx) if routing == "masked" else -1].append(position)
    yield from groups.items()


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
        routing: counts of the held-out prompts under natural routing; `in_batch_idx` is a prompt's place among the natural
            answers.
        routing_before: the same of the model before the repair.

    Returns:
        `unsafe_refusal_rate` and `safe_refusal_rate` (value, n, low, high) and `target_loss` (nats per token over all target
        tokens: value, n, low, high, num_tokens), under natural routing; `per_category` and `per_batch`, each a mapping to
        the same three; `masked`, all of that under masked routing; `neutral_loss`, as `target_loss`; `routing_drift`, from
        the function of that name. What was not measured is None.
    """
    natural = answers[answers["routing"] == "natural"]
    drift = None
    if routing is not None and routing_before is not None:
        drift = routing_drift(
            routing_before, routing, clusters=prompt_clusters(natural).to_numpy()[routing.in_batch_idx]
        )
    return {
        **_summary_of(natural),
        "masked": _block(answers, "masked", _summary_of),
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
        own = rows[rows["label"] == label]
        figures[f"{label}_refusal_rate"] = clustered_rate(own["refused"], own["cluster"].to_numpy()).as_dict()
    scored = rows[rows["target_tokens"] > 0]
    figures["target_loss"] = _loss(scored["target_loss"], scored["target_tokens"], scored["cluster"])
    return figures


def _loss(summed: pd.Series, tokens: pd.Series, clusters: pd.Series | None) -> dict[str, Any]:
    ids = None if clusters is None else clusters.to_numpy()
    per_token = (summed / tokens).to_numpy(dtype=np.float64)
    return clustered_mean(per_token, weights=tokens.to_numpy(), clusters=ids).as_dict() | {
        "num_tokens": int(tokens.sum())
    }


def compare(
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
        "masked": _block(rows, "masked", _change_of),
        "neutral_loss": neutral,
    }


def _change_of(rows: pd.DataFrame) -> dict[str, Any]:
    clustered = rows.assign(cluster=prompt_clusters(rows))
    return {**_changes(clustered), **_divided(clustered, _changes)}


def _changes(rows: pd.DataFrame) -> dict[str, Any]:
    changes: dict[str, Any] = {}
    for label in ("unsafe", "safe"):
        own = rows[rows["label"] == label]
        refused = [own[f"refused_{when}"].to_numpy(dtype=bool) for when in ("before", "after")]
        changes[f"{label}_refusal_rate"] = paired_difference(*refused, clusters=own["cluster"].to_numpy()).as_dict()
    scored = rows[rows["target_tokens"] > 0]
    losses = (scored["target_loss_before"], scored["target_loss_after"])
    changes["target_loss"] = _loss_change(*losses, scored["target_tokens"], scored["cluster"])
    return changes


def _loss_change(before: pd.Series, after: pd.Series, tokens: pd.Series, clusters: pd.Series | None) -> dict[str, Any]:
    per_token = [(summed.to_numpy() / tokens.to_numpy()).astype(np.float64) for summed in (before, after)]
    ids = None if clusters is None else clusters.to_numpy()
    return paired_difference(*per_token, clusters=ids, weights=tokens.to_numpy()).as_dict()


def headline_metrics(summary: Mapping[str, Any]) -> dict[str, float]:
    """The overall values of a summary by name, for tracking: what was not measured is left out.

    Args:
        summary: from `summarise`.
    """
    values = {name: summary[name]["value"] for name in FIGURES}
    if summary["masked"] is not None:
        values |= {f"masked/{name}": summary["masked"][name]["value"] for name in FIGURES}
    if summary["neutral_loss"] is not None:
        values["neutral_loss"] = summary["neutral_loss"]["value"]
    if summary["routing_drift"] is not None:
        values |= {
            f"routing_drift/{name}": summary["routing_drift"][name]["value"]
            for name in ("mean_absolute_change", "largest_change")
        }
    return {name: value for name, value in values.items() if value is not None}


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


def routing_drift(
    before: RoutingCounts, after: RoutingCounts, *, clusters: npt.ArrayLike | None = None
) -> dict[str, Any]:
    """How far activation rates moved, over all prompts.

    Intervals are those of the jackknife over clusters with Student's t (Efron & Tibshirani 1993, chapter 11). A model whose
    routing did not change has a drift of exactly 0. The largest change is chosen for being the largest; its interval does
    not account for that.

    Args:
        before: of the prompts.
        after: of the same prompts in the same order.
        clusters: (N,) equal values on prompts that are not independent; None = every prompt its own.

    Returns:
        `mean_absolute_change`, over layers and experts, and `largest_change`, each (value, n, low, high); the latter's
        `layer` and `expert`.

    Raises:
        InputError: the counts are not of the same prompts or not of one architecture.
    """
    same = before.counts_NLE.shape == after.counts_NLE.shape and np.array_equal(before.num_tokens, after.num_tokens)
    if not same or before.layers != after.layers:
        raise InputError("routing before and after is not of the same prompts; evaluate both on the same ones")
    ids = np.unique(np.arange(len(before)) if clusters is None else np.asarray(clusters), return_inverse=True)[1]
    moved_CLE = np.zeros((ids.max() + 1, *before.counts_NLE.shape[1:]), dtype=np.int64)
    np.add.at(moved_CLE, ids, after.counts_NLE.astype(np.int64) - before.counts_NLE)
    tokens_C = np.bincount(ids, before.num_tokens)
    change_LE = moved_CLE.sum(axis=0) / tokens_C.sum()
    row, expert = np.unravel_index(int(np.abs(change_LE).argmax()), change_LE.shape)
    with np.errstate(invalid="ignore", divide="ignore"):  # a lone cluster leaves nothing without it
        without_CLE = (moved_CLE.sum(axis=0) - moved_CLE) / (tokens_C.sum() - tokens_C)[:, None, None]
    mean = jackknife(float(np.abs(change_LE).mean()), np.abs(without_CLE).mean(axis=(1, 2)), n=len(before))
    largest = jackknife(float(change_LE[row, expert]), without_CLE[:, row, expert], n=len(before))
    return {
        "mean_absolute_change": {**mean.as_dict(), "low": None if math.isnan(mean.low) else max(0.0, mean.low)},
        "largest_change": largest.as_dict(),
        "layer": int(before.layers[int(row)]),
        "expert": int(expert),
    }
