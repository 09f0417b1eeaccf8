"""Rounds: fine-tune again for the batches that stay below their target, and stop when that no longer helps.

A batch's held-out examples are the unsafe validation examples of its category: a batch has none of its own, and a rate over
one or two examples would say nothing. Test examples are never looked at.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import pandas as pd

from moe_ray.config.rounds import RoundsConfig
from moe_ray.evaluation.intervals import Rate, rate
from moe_ray.evaluation.verdict_rates import COST, RATES, kinds_of
from moe_ray.experts import ExpertMasks, masks_from_experts


@dataclass(frozen=True, kw_only=True)
class RoundReport:
    """How the model does after a round, on the validation split.

    Attributes:
        round: 1-based.
        lagging: batches below the target, ascending.
        shortfall: mean over batches of how far below the target they are (0 to 1).
        unsafe_refusal_rate: over all unsafe validation examples.
        safe_refusal_rate: over all safe ones.
        cost: shortfall plus the share of safe examples that is refused or gets a degenerate answer: what a round must lower
            to be an improvement.
    """

    round: int
    lagging: tuple[int, ...]
    shortfall: float
    unsafe_refusal_rate: float
    safe_refusal_rate: float
    cost: float

    def as_dict(self) -> dict[str, Any]:
        """Plain values."""
        return asdict(self) | {"lagging": list(self.lagging)}


def batch_rates(answers: pd.DataFrame, categories: Mapping[int, str]) -> dict[int, Rate]:
    """Per batch the refusal rate on the unsafe validation examples of its category, on all unsafe ones where it has none.

    Args:
        answers: of the validation examples: rows with `label`, `category`, `refused`.
        categories: of the batches.
    """
    unsafe = answers[answers["label"] == "unsafe"]
    of_category = {str(name): group["refused"] for name, group in unsafe.groupby("category")}
    rates = {}
    for batch_idx, category in categories.items():
        refused = of_category.get(category, unsafe["refused"])
        rates[batch_idx] = rate(int(refused.sum()), len(refused))
    return rates


def report_round(number: int, answers: pd.DataFrame, categories: Mapping[int, str], target: float) -> RoundReport:
    """What the validation answers after a round say."""
    rates = batch_rates(answers, categories)
    shortfall = sum(max(0.0, target - batch_rate.value) for batch_rate in rates.values()) / len(rates)
    refused = answers.groupby("label")["refused"].mean()
    return RoundReport(
        round=number,
        lagging=tuple(sorted(batch for batch, batch_rate in rates.items() if batch_rate.value < target)),
        shortfall=shortfall,
        unsafe_refusal_rate=float(refused["unsafe"]),
        safe_refusal_rate=float(refused["safe"]),
        cost=shortfall + float(kinds_of(answers[answers["label"] == "safe"]).isin(RATES[COST][1]).mean()),
    )


def stop_reason(reports: Sequence[RoundReport], config: RoundsConfig) -> str:
    """Why no further round is run; empty = another one is."""
    last = reports[-1]
    if not last.lagging:
        return f"every batch reached its target of {config.target:.0%}"
    if len(reports) > 1 and best_round(reports[:-1]).cost - last.cost < config.min_improvement:
        return f"nothing improved in round {last.round}; {len(last.lagging)} batches stay below their target"
    if last.round == config.max_rounds:
        return f"rounds.max_rounds={config.max_rounds} are done; {len(last.lagging)} batches stay below their target"
    return ""


def best_round(reports: Sequence[RoundReport]) -> RoundReport:
    """The round with the least cost, the earliest of equals: its learned experts are kept."""
    return min(reports, key=lambda report: (report.cost, report.round))


def raised_weights(weights: Mapping[int, float], lagging: Sequence[int], factor: float) -> dict[int, float]:
    """The weights with those of lagging batches multiplied by the factor; 1 where none was given."""
    return {**weights, **{batch: weights.get(batch, 1.0) * factor for batch in lagging}}


def exchanged_masks(masks: ExpertMasks, found: ExpertMasks) -> ExpertMasks:
    """The masks of `found`; a batch for which it has no expert keeps the mask it had."""
    selected = {batch: found.selected.get(batch, ()) or masks.selected[batch] for batch in masks.batch_idx}
    return masks_from_experts(selected, layers=masks.layers, num_experts=masks.masks_BLE.shape[2])
