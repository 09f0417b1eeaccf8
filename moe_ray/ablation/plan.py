"""Which batches are checked, on which prompts, and without which experts: all of it before a model is asked.

Shape suffixes: L MoE layers, E experts.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
import pandas as pd

from moe_ray.ablation.expert_sets import (
    BUSIEST,
    FORCED,
    FORCED_MATCHED,
    GLOBAL,
    MATCHED,
    OTHER,
    SELECTED,
    ExpertSet,
    Floats,
    as_mask,
    busiest_set,
    coalitions,
    matched_set,
    routed_around,
    single_experts,
)
from moe_ray.config.ablate import AblateConfig
from moe_ray.errors import NothingSelected
from moe_ray.experts import Expert, ExpertMasks
from moe_ray.identification.risk_tables import Risk, aggregate_risk, batch_table, batch_tables
from moe_ray.prompts.batches import MIXED

FEWEST_HELD_OUT = 4
"""Held-out prompts of a label with which a batch is checked; with fewer its own are taken."""
COLUMNS = ("id", "label", "pair", "messages")
LABELS = ("unsafe", "safe")

Source = Literal["held_out", "batch"]


@dataclass(frozen=True, kw_only=True)
class BatchPlan:
    """What is done for one batch; plain values.

    Attributes:
        batch_idx: the batch.
        category: of its unsafe examples, or `mixed`.
        source: whose prompts these are.
        prompts: rows with `COLUMNS`.
        sets: the experts, the selection first.
        shares: of each set, its share of all tokens that are routed in the batch (0 to 1).
        answers: by a prompt's id, the token ids of the greedy answer that it has been given already; the others are asked.
    """

    batch_idx: int
    category: str
    source: Source
    prompts: pd.DataFrame
    sets: tuple[ExpertSet, ...]
    shares: tuple[float, ...]
    answers: Mapping[str, Sequence[int]] = field(default_factory=dict)

    def __repr__(self) -> str:
        return f"BatchPlan({self.batch_idx}, {self.category}, {len(self.prompts)} prompts, {len(self.sets)} sets)"


def chosen_batches(masks: ExpertMasks, categories: Mapping[int, str], most: int) -> list[int]:
    """The batches with experts that are checked, ascending: spread evenly over the categories, and over each of them.

    Args:
        masks: of all batches.
        categories: per `batch_idx`.
        most: how many; 0 = all.

    Raises:
        NothingSelected: no batch has any.
    """
    trained = list(masks.trained_batches)
    if not trained:
        raise NothingSelected("no batch has an unsafe expert, so none can be taken away; lower identify.threshold")
    if not most or most >= len(trained):
        return sorted(trained)
    by_category: dict[str, list[int]] = {}
    for batch in sorted(trained):
        by_category.setdefault(categories[batch], []).append(batch)
    names = sorted(by_category)
    if most < len(names):
        names = [names[number * len(names) // most] for number in range(most)]
    wanted = dict.fromkeys(names, 0)
    while sum(wanted.values()) < most:
        for name in names:
            if wanted[name] < len(by_category[name]) and sum(wanted.values()) < most:
                wanted[name] += 1
        if all(wanted[name] == len(by_category[name]) for name in names):
            break
    chosen = []
    for name, number in wanted.items():
        batches = by_category[name]
        chosen += [batches[place * len(batches) // number] for place in range(number)]
    return sorted(chosen)


def prompts_of_batches(
    chosen: Mapping[int, str], own: pd.DataFrame, held_out: pd.DataFrame | None, config: AblateConfig, *, seed: int
) -> dict[int, tuple[Source, pd.DataFrame]]:
    """The prompts that each batch is asked; batches that lack a label are left out.

    Batches of one category share its held-out prompts out among them where there are enough for all, else all of them are
    asked the same ones; `tables.label_groups` sees to it that no prompt counts twice. Safe prompts of a category that has
    none held out are any others.

    Args:
        chosen: batches to their category.
        own: usable examples of the batches, rows with `batch_idx` and `COLUMNS`.
        held_out: rows with `COLUMNS` and `category`; None = there are none.
        config: `source` and `prompts`.
        seed: which prompts are taken where there are more.
    """
    by_label = {label: own[own["label"] == label] for label in LABELS}
    shared = {label: _shared_out(chosen, held_out, label, config.prompts, seed) for label in LABELS}
    enough = min(FEWEST_HELD_OUT, config.prompts)
    found: dict[int, tuple[Source, pd.DataFrame]] = {}
    for batch in chosen:
        held = [shared[label][batch] for label in LABELS]
        mine = [_in_order(by_label[label][by_label[label]["batch_idx"] == batch], seed) for label in LABELS]
        is_held_out = config.source == "held_out" and min(map(len, held)) >= enough
        parts = [rows.head(config.prompts)[list(COLUMNS)] for rows in (held if is_held_out else mine)]
        if min(map(len, parts)):
            found[batch] = ("held_out" if is_held_out else "batch", pd.concat(parts, ignore_index=True))
    return found


def _shared_out(
    chosen: Mapping[int, str], held_out: pd.DataFrame | None, label: str, most: int, seed: int
) -> dict[int, pd.DataFrame]:
    """Per batch its held-out prompts of a label, at most so many."""
    if held_out is None or held_out.empty:
        empty = pd.DataFrame(columns=[*COLUMNS, "category"])
        return dict.fromkeys(chosen, empty)
    rows = _in_order(held_out[held_out["label"] == label], seed)
    known = set(chosen.values()) - {MIXED}
    rest = rows[~rows["category"].isin(known)]
    has_own = {name: bool((rows["category"] == name).any()) for name in known}
    takers: dict[str, list[int]] = {}
    for batch, category in chosen.items():
        # An unsafe prompt of another category would ask for other experts; a safe one is a safe one.
        name = category if has_own.get(category) or (label == "unsafe" and category != MIXED) else ""
        takers.setdefault(name, []).append(batch)
    found = {}
    for name, batches in takers.items():
        # Where every category is claimed there is nothing left over, and mixed batches take from all.
        pool = rows[rows["category"] == name] if name else rest if len(rest) else rows
        for place, batch in enumerate(batches):
            first = place * most if len(pool) >= most * len(batches) else 0
            found[batch] = pool.iloc[first : first + most]
    return found


def _in_order(rows: pd.DataFrame, seed: int) -> pd.DataFrame:
    """The rows in a random order in which the forms of a pair have one place."""

    def key(pair: object, name: object) -> str:
        text = f"{seed}/{pair if isinstance(pair, str) and pair else name}"
        return hashlib.sha256(text.encode()).hexdigest()

    keys = [key(pair, name) for pair, name in zip(rows["pair"], rows["id"], strict=True)]
    return rows.iloc[np.argsort(np.array(keys, dtype=object), kind="stable")] if keys else rows


def plan_batches(
    prompts: Mapping[int, tuple[Source, pd.DataFrame]],
    masks: ExpertMasks,
    risk: Risk,
    categories: Mapping[int, str],
    config: AblateConfig,
    *,
    num_experts_per_tok: int,
    seed: int,
    column: str = "risk_diff",
) -> list[BatchPlan]:
    """What is done for each batch, ascending; batches whose experts cannot be routed around are left out.

    Args:
        prompts: from `prompts_of_batches`.
        masks: of all batches.
        risk: the risk table.
        categories: per `batch_idx`, of all batches with a mask.
        config: which sets.
        num_experts_per_tok: the router's k.
        seed: of the draws.
        column: of the risk table, by whose mean the one list for all batches is made.

    Raises:
        NothingSelected: no batch can be checked.
    """
    ranked = _ranked_overall(risk, column)
    plans = []
    for batch in sorted(prompts):
        selected_LE = routed_around(masks[batch], num_experts_per_tok)
        if not selected_LE.any():
            continue
        unsafe_LE, share_LE = _shares(risk, batch, selected_LE.shape)
        rng = np.random.default_rng([seed, batch])
        sets = [ExpertSet(SELECTED, 0, "", selected_LE)]
        sets += [ExpertSet(MATCHED, draw, "", matched_set(selected_LE, share_LE, rng)) for draw in range(config.draws)]
        sets.append(ExpertSet(BUSIEST, 0, "", busiest_set(selected_LE, unsafe_LE)))
        others = [other for other in masks.trained_batches if categories[other] != categories[batch]]
        for draw, place in enumerate(rng.permutation(len(others))[: config.others].tolist()):
            sets.append(ExpertSet(OTHER, draw, "", routed_around(masks[others[place]], num_experts_per_tok)))
        in_one_list = as_mask(ranked[: int(selected_LE.sum())], masks.layers, selected_LE.shape[1])
        sets.append(ExpertSet(GLOBAL, 0, "", routed_around(in_one_list, num_experts_per_tok)))
        if config.forced:
            sets.append(ExpertSet(FORCED, 0, "", selected_LE, is_forced=True))
            sets.append(ExpertSet(FORCED_MATCHED, 0, "", sets[1].mask_LE, is_forced=True))
        sets += single_experts(selected_LE, masks.selected[batch], masks.layers, config.leave_one_out)
        sets += coalitions(selected_LE, masks.selected[batch], masks.layers, config.curve)
        source, rows = prompts[batch]
        plans.append(
            BatchPlan(
                batch_idx=batch,
                category=categories[batch],
                source=source,
                prompts=rows,
                sets=tuple(item for item in sets if item.mask_LE.any()),
                shares=tuple(
                    float(share_LE[item.mask_LE].sum() / share_LE.sum()) for item in sets if item.mask_LE.any()
                ),
            )
        )
    if not plans:
        raise NothingSelected(
            f"none of {len(prompts)} batches can be checked: it takes prompts of both labels, and a layer in which as many "
            "experts are left as a token uses; lower identify.top_k or use more prompts"
        )
    return plans


def _shares(risk: Risk, batch: int, shape: Sequence[int]) -> tuple[Floats, Floats]:
    """(L, E) share of the unsafe tokens, and of both labels' with equal weight, that is routed to each expert."""
    rows = batch_table(risk, batch).sort_values(["layer", "expert"])
    unsafe_LE = rows["a_unsafe_n"].to_numpy(dtype=np.float64).reshape(shape)
    safe_LE = rows["a_safe_n"].to_numpy(dtype=np.float64).reshape(shape)
    return unsafe_LE, (unsafe_LE + safe_LE) / 2


def _ranked_overall(risk: Risk, column: str) -> list[Expert]:
    """All experts, the largest mean over batches first, ties by (layer, expert)."""
    table = aggregate_risk(risk)
    if column in table:
        table = table.sort_values([column, "layer", "expert"], ascending=[False, True, True])
        return [Expert(int(layer), int(expert)) for layer, expert in zip(table["layer"], table["expert"], strict=True)]
    totals: dict[tuple[int, int], float] = {}
    for _, rows in batch_tables(risk, [column]):
        for layer, expert, value in zip(rows["layer"], rows["expert"], rows[column].fillna(0.0), strict=True):
            totals[layer, expert] = totals.get((layer, expert), 0.0) + float(value)
    return [Expert(int(layer), int(expert)) for layer, expert in sorted(totals, key=lambda key: (-totals[key], key))]
