"""Other ways to spend the budget of per-batch masks, so that the claim that per-batch masks are better can fail.

Every arm trains the same batches in the same order for as many steps, and on the same rows. Where an arm chooses experts,
it chooses as many as the per-batch masks hold; where the budget is the number of parameters that train, it takes as many
experts, as large a rank or as many tensors as come nearest to that number. `docs/baselines.md` says of each arm what is
equal and what cannot be.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Literal

from moe_ray.config.compare import BASELINES, POLICIES, POLICY, CompareConfig
from moe_ray.config.finetune import FinetuneConfig
from moe_ray.config.values import WrongSettings
from moe_ray.errors import InputError
from moe_ray.experts import ExpertMasks
from moe_ray.identification.risk_tables import Risk
from moe_ray.studies.baseline_masks import (
    Ranked,
    all_experts_masks,
    average_size,
    global_masks,
    largest_of_layers,
    largest_shares,
    only_batches,
    random_masks,
    renamed_masks,
    shuffled_masks,
    sieve_masks,
)

OURS, BASE, TRANSFER = "per_batch", "base", "transfer"
"""The arm that all others are compared with, the arm that trains nothing, and those that train one category."""

Learns = Literal["experts", "low_rank", "attention", "router", "all", "nothing"]
"""What an arm trains: its masks' experts, low-rank differences of these, a group of other parameters, or nothing."""

NEEDED_COLUMN: Mapping[str, str] = {"esft_gate": "w_unsafe", "reap": "reap"}
"""Columns that a risk table need not have, by the baseline that cannot do without."""

_GROUPS: Mapping[str, Learns] = {"attention_only": "attention", "router_only": "router", "full": "all"}


@dataclass(frozen=True, kw_only=True)
class Arm:
    """One row of the comparison.

    Attributes:
        name: of the row; a draw's number is part of it.
        kind: `OURS`, `BASE`, `TRANSFER` or a baseline of `compare.names`.
        masks: by `batch_idx`; None = no mask.
        train: hyperparameters.
        learns: what trains.
        rank: of low-rank differences; 0 = whatever comes nearest to the budget.
        is_matched: it was made for the number of parameters that train, and would be another one without.
        category: the only one whose batches train; empty = those of all arms.
    """

    name: str
    kind: str
    masks: ExpertMasks | None
    train: FinetuneConfig
    learns: Learns = "experts"
    rank: int = 0
    is_matched: bool = False
    category: str = ""

    def __repr__(self) -> str:
        size = "no mask" if self.masks is None else f"{len(self.masks.union_experts)} experts in the union"
        return f"Arm({self.name}, learns {self.learns}, {size})"

    @property
    def folder(self) -> str:
        """Of its results, in that of the comparison: another one for each budget, so that both are kept."""
        return f"{self.name.replace(':', '_')}{'_matched' if self.is_matched else ''}"


BASE_ARM = Arm(name=BASE, kind=BASE, masks=None, train=FinetuneConfig(), learns="nothing")


def masks_to_compare(ours: ExpertMasks, compare: CompareConfig, category_of: Mapping[int, str]) -> ExpertMasks:
    """The per-batch masks, of which only batches of `compare.categories` train.

    Args:
        ours: from selection.
        compare: the section `compare`.
        category_of: per `batch_idx`.

    Raises:
        InputError: no batch with unsafe experts is of a category that is named.
    """
    if not compare.categories:
        return ours
    known = {category_of.get(batch, "") for batch in ours.trained_batches}
    if unknown := [name for name in compare.categories if name not in known]:
        raise InputError(
            f"compare.categories: got {unknown[0]!r}, expected categories of batches with unsafe experts, which are "
            f"{sorted(known)}"
        )
    return only_batches(ours, {batch for batch in ours.batch_idx if category_of.get(batch) in compare.categories})


def plan_arms(
    ours: ExpertMasks, risk: Risk, train: FinetuneConfig, compare: CompareConfig, category_of: Mapping[int, str]
) -> list[Arm]:
    """The per-batch masks first, then the baselines asked for; no names = all that the risk table allows.

    Early stopping is off, so that all arms take the same steps.

    Args:
        ours: the per-batch masks, from `masks_to_compare`.
        risk: from `identify`.
        train: of the per-batch masks.
        compare: the section `compare`.
        category_of: per `batch_idx`.

    Raises:
        InputError: a baseline is named that the risk table has no column for, that one batch cannot have, or that is what
            the run does anyway.
    """
    train = replace(train, patience=0)
    plan = _Plan(ours, risk, train, compare, category_of)
    arms = [Arm(name=OURS, kind=OURS, masks=ours, train=train)]
    for kind in compare.names or plan.possible():
        arms += plan.arms_of(kind)
    return arms


def plan_transfer(
    ours: ExpertMasks, train: FinetuneConfig, compare: CompareConfig, category_of: Mapping[int, str]
) -> list[Arm]:
    """An arm for each category, in which only its own batches train, each under its own mask.

    Args:
        ours: the per-batch masks of all categories.
        train: of the per-batch masks.
        compare: the section `compare`.
        category_of: per `batch_idx`.

    Raises:
        InputError: the batches with unsafe experts are of fewer than two categories.
    """
    names = sorted({category_of.get(batch, "") for batch in ours.trained_batches} - {""})
    if len(names) < 2:
        raise InputError(
            f"compare.transfer: got batches of the categories {names}, expected two or more; give the prompts categories, "
            "or set compare.transfer=false"
        )
    train = replace(train, patience=0, epochs=compare.transfer_epochs or train.epochs)
    return [
        Arm(
            name=f"{TRANSFER}_{number:03d}",
            kind=TRANSFER,
            masks=only_batches(ours, {batch for batch in ours.batch_idx if category_of.get(batch) == name}),
            train=train,
            category=name,
        )
        for number, name in enumerate(names)
    ]


class _Plan:
    """What every baseline is made of."""

    def __init__(
        self,
        ours: ExpertMasks,
        risk: Risk,
        train: FinetuneConfig,
        compare: CompareConfig,
        category_of: Mapping[int, str],
    ) -> None:
        self.ours, self.risk, self.train, self.compare, self.category_of = ours, risk, train, compare, category_of
        self.matches = compare.budget == "parameters"

    def possible(self) -> tuple[str, ...]:
        """All baselines that there is what they need for; of the other policies one: natural, or masked beside it."""
        other = f"{POLICY}{'masked' if self.train.routing == 'natural' else 'natural'}"
        missing = {kind for kind, column in NEEDED_COLUMN.items() if column not in self.risk}
        missing |= {f"{POLICY}{name}" for name in POLICIES} - {other}
        if len(self.ours.trained_batches) < 2:
            missing.add("shuffled")
        if self.matches:
            missing.add("global_union")  # which global is then
        return tuple(kind for kind in BASELINES if kind not in missing)

    def arms_of(self, kind: str) -> list[Arm]:
        """One arm, or several draws of it."""
        if kind.startswith(POLICY):
            return [self._arm(kind, self.ours, train=self._policy(kind.removeprefix(POLICY)))]
        if kind in _GROUPS:
            rate = (kind == "full" and self.compare.full_learning_rate) or self.train.learning_rate
            train = replace(self.train, learning_rate=rate)
            return [self._arm(kind, None, train=train, learns=_GROUPS[kind], is_matched=kind != "full")]
        if kind in ("lora_same", "lora_all", "moe_sieve"):
            return [self._low_rank(kind)]
        if kind == "mask_only":
            return [self._arm(kind, self.ours, learns="nothing")]
        if kind in ("random", "shuffled"):
            draws = range(self.compare.draws)
            is_matched = kind == "random"
            return [self._arm(kind, self._drawn(kind, d), name=f"{kind}_{d}", is_matched=is_matched) for d in draws]
        return [self._arm(kind, self._chosen(kind), is_matched=kind not in ("all_experts", "global_union"))]

    def _arm(
        self,
        kind: str,
        masks: ExpertMasks | None,
        *,
        name: str = "",
        train: FinetuneConfig | None = None,
        learns: Learns = "experts",
        is_matched: bool = False,
    ) -> Arm:
        return Arm(
            name=name or kind,
            kind=kind,
            masks=masks,
            train=train or self.train,
            learns=learns,
            is_matched=is_matched and self.matches,
        )

    def _policy(self, routing: str) -> FinetuneConfig:
        if routing == self.train.routing:
            raise InputError(
                f"compare.names: {POLICY}{routing} is what the run does (finetune.routing={routing}); leave it out"
            )
        # Which policies take a boost is checked where they are declared: tried without, then with one.
        try:
            return replace(self.train, routing=routing, boost=0.0)  # type: ignore[arg-type]  # one of `POLICIES`
        except WrongSettings:
            return replace(self.train, routing=routing, boost=self.train.boost or self.compare.policy_boost)  # type: ignore[arg-type]

    def _low_rank(self, kind: str) -> Arm:
        masks: Mapping[str, Callable[[], ExpertMasks]] = {
            "lora_same": lambda: self.ours,
            "lora_all": lambda: all_experts_masks(self.ours),
            "moe_sieve": lambda: sieve_masks(self.ours, self.risk),
        }
        rate = self.compare.lora_learning_rate or self.train.learning_rate
        train = replace(self.train, learning_rate=rate)
        if kind != "lora_same":
            # Published without a mask; a mask of the whole layer, or of its busiest experts, is not what they propose.
            train = replace(train, routing="natural", boost=0.0)
        arm = self._arm(kind, masks[kind](), train=train, learns="low_rank", is_matched=True)
        return replace(arm, rank=0 if arm.is_matched else self.compare.lora_rank)

    def _drawn(self, kind: str, seed: int) -> ExpertMasks:
        if kind == "shuffled":
            return shuffled_masks(self.ours, self.category_of, seed=seed)
        return (renamed_masks if self.matches else random_masks)(self.ours, seed=seed)

    def _chosen(self, kind: str) -> ExpertMasks:
        num_union = len(self.ours.union_experts)
        if kind == "all_experts":
            return all_experts_masks(self.ours)
        if kind in ("global", "global_union"):
            is_large = self.matches or kind == "global_union"
            return global_masks(self.ours, self.risk, num_experts=num_union if is_large else average_size(self.ours))
        ranked = self._ranked(kind)
        return ranked.masks_of_union(num_union) if self.matches else ranked.masks()

    def _ranked(self, kind: str) -> Ranked:
        if kind in ("esft_token", "esft_gate"):
            column = "a_unsafe" if kind == "esft_token" else "w_unsafe"
            return largest_shares(self.ours, self.risk, column=column)
        return largest_of_layers(self.ours, self.risk, column="a_unsafe" if kind == "busiest" else "reap")
