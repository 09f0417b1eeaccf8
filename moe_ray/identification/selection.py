"""Selection rules: the method's own, and published or plain ones to compare it with, behind one call.

Every rule sees the risk table of one batch and returns that batch's experts, the strongest first; filters then only take
experts away. `RULES` names each rule's source.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import numpy.typing as npt
import pandas as pd

from moe_ray.config.identify import IdentifyConfig
from moe_ray.errors import InputError, NothingSelected
from moe_ray.experts import Expert, ExpertMasks, masks_from_experts

SCORE_COLUMN = {"tokens": "risk_diff", "prompts": "risk_diff_prompt", "activation": "risk_diff_activation"}
"""The column that `identify.weighting` ranks experts by."""

_P_COLUMN = {"maxt": "p_maxt", "bh": "q", "none": "p"}
_ROUNDING = 1e-12
"""A p of 0.05 or a share of 0.9 is a fraction that floats hold only nearly; equality within this counts as equality."""


@dataclass(frozen=True)
class Rule:
    """A way to choose a batch's experts.

    Attributes:
        source: where it comes from.
        choose: the risk table of one batch, the configuration and a seed to the experts, the strongest first.
    """

    source: str
    choose: Callable[[pd.DataFrame, IdentifyConfig, int], tuple[Expert, ...]]


def above_alpha(p: pd.Series, alpha: float) -> pd.Series:
    """Whether each p is above alpha; equality within rounding is not above."""
    return p > alpha + _ROUNDING


def unsafe_experts(table: pd.DataFrame, config: IdentifyConfig, *, seed: int = 0) -> tuple[Expert, ...]:
    """The unsafe experts of one batch, the strongest first.

    Args:
        table: rows of one batch from `identify`, in any order.
        config: rule, weighting, thresholds and filters.
        seed: of rule `random`.

    Raises:
        InputError: the table lacks a column that the configuration needs.
    """
    return RULES[config.rule].choose(table, config, seed)


def select(risk: pd.DataFrame, config: IdentifyConfig, *, seed: int = 0) -> ExpertMasks:
    """The masks of all batches.

    Args:
        risk: from `identify`, in any row order.
        config: rule, weighting, thresholds and filters.
        seed: of rule `random`.

    Raises:
        InputError: no batch has any unsafe expert, or the table lacks a column that the configuration needs.
    """
    return select_from([risk], config, seed=seed)


def select_from(tables: Iterable[pd.DataFrame], config: IdentifyConfig, *, seed: int = 0) -> ExpertMasks:
    """The masks of all batches, as `select` of all the tables in one; only one of them is held at a time.

    Args:
        tables: from `identify`, each of other batches.
        config: rule, weighting, thresholds and filters.
        seed: of rule `random`.

    Raises:
        InputError: no batch has any unsafe expert, or a table lacks a column that the configuration needs.
    """
    selected: dict[int, tuple[Expert, ...]] = {}
    layers: set[int] = set()
    num_experts, largest, smallest_p, empty = 0, -np.inf, np.inf, pd.Series(dtype=np.float64)
    for risk in tables:
        selected |= {batch: unsafe_experts(table, config, seed=seed) for batch, table in batch_tables(risk)}
        layers |= set(np.unique(risk["layer"]).tolist())
        num_experts = max(num_experts, int(risk["expert"].max()) + 1)
        # For the message alone; a table need not have what its rule does not use.
        largest = max(largest, float(risk.get(SCORE_COLUMN[config.weighting], empty).max()))
        smallest_p = min(smallest_p, float(risk.get("p_maxt", empty).min()))
    if not any(selected.values()):
        raise NothingSelected(_nothing_selected(largest, smallest_p, config, len(selected)))
    in_order = {batch: selected[batch] for batch in sorted(selected)}
    return masks_from_experts(in_order, layers=sorted(layers), num_experts=num_experts)


def batch_tables(risk: pd.DataFrame) -> Iterator[tuple[int, pd.DataFrame]]:
    """Yields each batch and its rows, ascending by `batch_idx`."""
    names = risk["batch_idx"].to_numpy()
    if (np.diff(names) < 0).any():
        risk = risk.iloc[np.argsort(names, kind="stable")]
        names = risk["batch_idx"].to_numpy()
    starts = [*np.flatnonzero(np.diff(names, prepend=names[0] - 1)), len(names)] if len(names) else []
    for start, end in pairwise(starts):
        yield int(names[start]), risk.iloc[start:end]


def _nothing_selected(largest: float, smallest_p: float, config: IdentifyConfig, num_batches: int) -> str:
    score = SCORE_COLUMN[config.weighting]
    if largest <= config.threshold:
        return (
            f"no expert of any of {num_batches} batches has {score} above {config.threshold}; the largest is "
            f"{largest:.4f}; lower identify.threshold"
        )
    return (
        f"no expert of any of {num_batches} batches passes identify.alpha={config.alpha} ({config.correction}) and "
        f"identify.stability={config.stability}; the smallest corrected p is {smallest_p:.3g}, so at this "
        "number of prompts no selected expert is significant; use more prompts a batch "
        "(prompts.safe_per_batch, prompts.unsafe_per_batch), or set identify.alpha=0 and identify.stability=0"
    )


def _score(table: pd.DataFrame, config: IdentifyConfig) -> str:
    column = SCORE_COLUMN[config.weighting]
    _require_column(table, column, f"identify.weighting={config.weighting}")
    return column


def _require_column(table: pd.DataFrame, column: str, setting: str) -> None:
    if column not in table:
        raise InputError(
            f"{setting} needs the column {column!r}, which the risk table lacks; compute it with moe_ray.identification "
            "from counts that hold what it needs (routed weights for activation and esft_gate)"
        )


def _risk_diff(table: pd.DataFrame, config: IdentifyConfig, seed: int) -> tuple[Expert, ...]:
    column = _score(table, config)
    chosen = top_experts(table, threshold=config.threshold, top_k=config.top_k, column=column)
    return _filtered(chosen, table, config)


def _per_layer(table: pd.DataFrame, config: IdentifyConfig, seed: int) -> tuple[Expert, ...]:
    column = _score(table, config)
    ordered = _by_score(table[table[column] > config.threshold], column)
    ordered = ordered[ordered.groupby("layer").cumcount() < config.per_layer_quota]
    return _filtered(_experts_of(ordered), table, config)


def _by_score(table: pd.DataFrame, column: str) -> pd.DataFrame:
    return table.sort_values([column, "layer", "expert"], ascending=[False, True, True])


def as_experts(layers: Iterable[int], experts: Iterable[int]) -> tuple[Expert, ...]:
    """The experts of two columns, in their order."""
    return tuple(Expert(int(layer), int(expert)) for layer, expert in zip(layers, experts, strict=True))


def _experts_of(table: pd.DataFrame) -> tuple[Expert, ...]:
    return as_experts(table["layer"].tolist(), table["expert"].tolist())


def _filtered(chosen: tuple[Expert, ...], table: pd.DataFrame, config: IdentifyConfig) -> tuple[Expert, ...]:
    """The chosen experts that `identify.alpha` and `identify.stability` leave, in the same order."""
    if not (config.alpha or config.stability):
        return chosen
    dropped = pd.Series(False, index=table.index)
    if config.alpha:
        column = _P_COLUMN[config.correction]
        _require_column(table, column, f"identify.alpha={config.alpha}")
        dropped |= above_alpha(table[column], config.alpha) | table[column].isna()
    if config.stability:
        _require_column(table, "stability", f"identify.stability={config.stability}")
        dropped |= ~(table["stability"] >= config.stability - _ROUNDING)
    remaining = set(_experts_of(table[~dropped]))
    # Filtered after the top_k were chosen: an expert that is dropped is not replaced by the next weaker one, since that
    # would make a stricter filter select experts that a laxer one does not.
    return tuple(expert for expert in chosen if expert in remaining)


def by_layer_share(table: pd.DataFrame, column: str) -> pd.DataFrame:
    """One batch's table with `share`, each expert's part of its layer's total of the column, the largest first.

    A layer whose total is 0 has shares of 0; ties are ordered by (layer, expert).
    """
    share = table[column] / table.groupby("layer")[column].transform("sum")
    return _by_score(table.assign(share=share.fillna(0.0)), "share")


def _cumulative(column: str, setting: str) -> Callable[[pd.DataFrame, IdentifyConfig, int], tuple[Expert, ...]]:
    """A rule: per layer the fewest experts whose share of the column's layer sum reaches `top_p`."""

    def choose(table: pd.DataFrame, config: IdentifyConfig, seed: int) -> tuple[Expert, ...]:
        _require_column(table, column, setting)
        ordered = by_layer_share(table, column)
        # An expert is needed while those before it do not reach top_p; its own share may go beyond.
        before = ordered.groupby("layer")["share"].cumsum() - ordered["share"]
        return _experts_of(ordered[(before < config.top_p - _ROUNDING) & (ordered["share"] > 0)])

    return choose


def _random(table: pd.DataFrame, config: IdentifyConfig, seed: int) -> tuple[Expert, ...]:
    """As many experts of each layer as rule `risk_diff` gives, without regard to any number."""
    matched = _risk_diff(table, config, seed)
    layers = np.array([expert.layer for expert in matched], dtype=np.int64)
    rng = np.random.default_rng([seed, int(table["batch_idx"].iloc[0])])
    drawn: list[Expert] = []
    for layer in np.unique(layers):
        experts: npt.NDArray[np.int64] = np.unique(table.loc[table["layer"] == layer, "expert"])
        drawn += draw_experts(rng, int(layer), experts, number=int((layers == layer).sum()))
    return tuple(drawn)


def draw_experts(
    rng: np.random.Generator, layer: int, experts: npt.NDArray[np.int64], *, number: int
) -> tuple[Expert, ...]:
    """So many different experts of one layer, drawn from the given ones, in ascending order."""
    return tuple(Expert(layer, int(expert)) for expert in np.sort(rng.choice(experts, size=number, replace=False)))


RULES: Mapping[str, Rule] = {
    "risk_diff": Rule("SteerMoE's risk difference (Fayyaz et al. 2025), per batch: above threshold, top_k", _risk_diff),
    "per_layer": Rule(
        "the same difference with an equal quota for every layer, so that no layer takes all", _per_layer
    ),
    "esft_token": Rule(
        "ESFT-Token (Wang et al. 2024, 'Let the Expert Stick to His Last', token selection ratio) on unsafe tokens",
        _cumulative("a_unsafe", "identify.rule=esft_token"),
    ),
    "esft_gate": Rule(
        "ESFT-Gate (Wang et al. 2024, 'Let the Expert Stick to His Last', average gate score) on unsafe tokens",
        _cumulative("w_unsafe", "identify.rule=esft_gate"),
    ),
    "random": Rule("control: random experts, as many of each layer as risk_diff gives, drawn by seed", _random),
}
"""Selection rules by `identify.rule`.

The ESFT scores are shares of a layer's total, as in the paper's text; the authors' public script divides by the sum over
layers instead, which mixes layers. ESFT averages samples of equal length; here a batch's unsafe tokens are pooled.
"""


def top_experts(table: pd.DataFrame, *, threshold: float, top_k: int, column: str = "risk_diff") -> tuple[Expert, ...]:
    """Experts of one table with `column` above the threshold, the `top_k` largest by value, ties by (layer, expert)."""
    values = table[column].to_numpy()
    above = np.flatnonzero(values > threshold)
    layers, experts = table["layer"].to_numpy()[above], table["expert"].to_numpy()[above]
    order = np.lexsort((experts, layers, -values[above]))[:top_k]
    return as_experts(layers[order], experts[order])
