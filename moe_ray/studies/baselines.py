"""Other ways to spend the budget of per-batch masks, so that the claim that per-batch masks are better can fail.

Every arm trains the same batches in the same order for as many steps, at the same learning rate and on the same rows.
Where an arm chooses experts, it chooses as many as the per-batch masks hold. Masks are pure functions of those and of the
risk table.

Shape suffixes: B batches, L MoE layers, E experts.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from moe_ray.config.compare import BASELINES, CompareConfig
from moe_ray.config.finetune import FinetuneConfig
from moe_ray.errors import InputError
from moe_ray.experts import Expert, ExpertMasks, masks_from_experts
from moe_ray.identification.risk_tables import Risk, aggregate_risk, batch_tables
from moe_ray.identification.selection import as_experts, by_layer_share, draw_experts

OURS = "per_batch"
"""The arm that all others are compared with."""

_ESFT_COLUMN = {"esft_token": "a_unsafe", "esft_gate": "w_unsafe"}


@dataclass(frozen=True, kw_only=True)
class Arm:
    """One row of the comparison.

    Attributes:
        name: of the row; a draw's number is part of it.
        kind: `OURS`, a baseline of `compare.names`, or the base model.
        masks: by `batch_idx`; None = no mask, every parameter trains.
        train: hyperparameters.
    """

    name: str
    kind: str
    masks: ExpertMasks | None
    train: FinetuneConfig

    def __repr__(self) -> str:
        size = "every parameter" if self.masks is None else f"{len(self.masks.union_experts)} experts in the union"
        return f"Arm({self.name}, {size})"


def plan_arms(ours: ExpertMasks, risk: Risk, train: FinetuneConfig, baselines: CompareConfig) -> list[Arm]:
    """The per-batch masks first, then the baselines asked for; no names = all that the risk table allows.

    Early stopping is off, so that all arms take the same steps.

    Raises:
        InputError: a baseline is named that the risk table has no column for, or that one batch cannot have.
    """
    train = replace(train, patience=0)
    arms = [Arm(name=OURS, kind=OURS, masks=ours, train=train)]
    for kind in baselines.names or _possible(ours, risk):
        if kind == "full":
            rate = baselines.full_learning_rate or train.learning_rate
            arms.append(Arm(name=kind, kind=kind, masks=None, train=replace(train, learning_rate=rate)))
        elif kind == "freezing_only":
            natural = replace(train, routing="natural", boost=0.0)
            arms.append(Arm(name=kind, kind=kind, masks=ours, train=natural))
        elif kind in ("random", "shuffled"):
            make = random_masks if kind == "random" else shuffled_masks
            draws = range(baselines.draws)
            arms += [Arm(name=f"{kind}_{d}", kind=kind, masks=make(ours, seed=d), train=train) for d in draws]
        else:
            arms.append(Arm(name=kind, kind=kind, masks=_chosen_masks(kind, ours, risk), train=train))
    return arms


def _possible(ours: ExpertMasks, risk: Risk) -> tuple[str, ...]:
    missing = {kind for kind, column in _ESFT_COLUMN.items() if column not in risk}
    if len(ours.trained_batches) < 2:
        missing.add("shuffled")
    return tuple(kind for kind in BASELINES if kind not in missing)


def _chosen_masks(kind: str, ours: ExpertMasks, risk: Risk) -> ExpertMasks:
    if kind == "global":
        return global_masks(ours, risk, num_experts=average_size(ours))
    if kind == "global_union":
        return global_masks(ours, risk, num_experts=len(ours.union_experts))
    if kind == "all_experts":
        return all_experts_masks(ours)
    return esft_masks(ours, risk, column=_ESFT_COLUMN[kind])


def average_size(masks: ExpertMasks) -> int:
    """Experts of the average trained batch, rounded."""
    return round(float(np.mean([len(masks.selected[batch]) for batch in masks.trained_batches])))


def global_masks(ours: ExpertMasks, risk: Risk, *, num_experts: int) -> ExpertMasks:
    """The same experts for every batch: those with the largest risk difference, averaged over batches."""
    table = aggregate_risk(risk).head(num_experts)
    chosen = as_experts(table["layer"], table["expert"])
    return _like(ours, {batch: chosen for batch in ours.trained_batches})


def random_masks(ours: ExpertMasks, *, seed: int) -> ExpertMasks:
    """For every batch as many experts of each layer as it has, drawn without regard to any number."""
    every = np.arange(ours.masks_BLE.shape[2])
    selected = {}
    for batch in ours.trained_batches:
        rng = np.random.default_rng([seed, batch])
        sizes_L = ours[batch].sum(axis=1)
        selected[batch] = tuple(
            expert
            for layer, size in zip(ours.layers, sizes_L.tolist(), strict=True)
            for expert in draw_experts(rng, layer, every, number=size)
        )
    return _like(ours, selected)


def shuffled_masks(ours: ExpertMasks, *, seed: int) -> ExpertMasks:
    """Masks permuted among batches without fixed points: no batch keeps its own.

    Batches of one category may have much alike in their masks, so this takes away less than random experts do.

    Raises:
        InputError: fewer than two batches have experts.
    """
    batches = list(ours.trained_batches)
    if len(batches) < 2:
        raise InputError(
            f"baseline shuffled: got {len(batches)} batches with unsafe experts, expected 2 or more; leave it out of "
            "compare.names"
        )
    order = np.random.default_rng(seed).permutation(batches).tolist()
    source_batch = dict(zip(order, [*order[1:], order[0]], strict=True))  # one cycle: none is its own
    return _like(ours, {batch: ours.selected[source_batch[batch]] for batch in batches})


def esft_masks(ours: ExpertMasks, risk: Risk, *, column: str) -> ExpertMasks:
    """For every batch as many experts as it has: those with the largest share of their layer's total of `column`.

    Source: ESFT (Wang et al. 2024, "Let the Expert Stick to His Last"), token selection ratio (`a_unsafe`) and average
    gate score (`w_unsafe`). Deviation: the paper takes experts until their shares reach a given sum in every layer; here
    the number is that of the masks it is compared with, per batch and over all layers.

    Raises:
        InputError: the risk table has no such column.
    """
    if column not in risk:
        raise InputError(
            f"this ESFT baseline needs {column!r}, which the routing counts lack; set capture.weights=true, which captures "
            "again, or leave esft_gate out of compare.names"
        )
    selected = {}
    trained = set(ours.trained_batches)
    for batch, table in batch_tables(risk, [column]):
        if batch in trained:
            chosen = by_layer_share(table, column).head(len(ours.selected[batch]))
            selected[batch] = as_experts(chosen["layer"], chosen["expert"])
    return _like(ours, selected)


def all_experts_masks(ours: ExpertMasks) -> ExpertMasks:
    """Every expert for every batch."""
    everything = tuple(Expert(layer, expert) for layer in ours.layers for expert in range(ours.masks_BLE.shape[2]))
    return _like(ours, {batch: everything for batch in ours.trained_batches})


def _like(ours: ExpertMasks, selected: Mapping[int, Iterable[Expert]]) -> ExpertMasks:
    """Masks of the same batches; those that our masks leave untrained stay so, which keeps the steps equal."""
    complete: Mapping[int, Sequence[Expert]] = {batch: tuple(selected.get(batch, ())) for batch in ours.batch_idx}
    return masks_from_experts(complete, layers=ours.layers, num_experts=ours.masks_BLE.shape[2])
