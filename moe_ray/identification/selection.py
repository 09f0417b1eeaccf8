"""Selection rules: the method's own, and published or plain ones to compare it with, behind one call.

Every rule sees the risk table of one batch and returns that batch's experts, the strongest first; filters then only take
experts away. `RULES` names each rule's source.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import pandas as pd

from moe_ray.config.identify import IdentifyConfig
from moe_ray.errors import NothingSelected
from moe_ray.experts import Expert, ExpertMasks, masks_from_experts
from moe_ray.identification.comparisons import COMPARISONS, is_relative
from moe_ray.identification.filters import ROUNDING, filtered, nothing_selected, require_column
from moe_ray.identification.risk_tables import Risk, batch_tables

SCORE_COLUMN = {"tokens": "risk_diff", "prompts": "risk_diff_prompt", "activation": "risk_diff_activation"}
"""The column that `identify.weighting` ranks experts by."""

_NAME_OF_WEIGHTING = {
    "tokens": "risk difference",
    "prompts": "risk difference by prompts",
    "activation": "risk difference by weight",
}
_COLUMN_OF_RULE = {"top_routed": "a_unsafe", "esft_token": "a_unsafe", "esft_gate": "w_unsafe"}


@dataclass(frozen=True)
class Rule:
    """A way to choose a batch's experts.

    Attributes:
        source: where it comes from.
        choose: the risk table of one batch, the configuration and a seed to the experts, the strongest first.
    """

    source: str
    choose: Callable[[pd.DataFrame, IdentifyConfig, int], tuple[Expert, ...]]


def ranking_column(config: IdentifyConfig) -> str:
    """The column of the risk table that the configured rule ranks experts by, the largest first.

    Rule `random` ranks by nothing; it has that of `risk_diff`, of which it draws as many.
    """
    return _COLUMN_OF_RULE.get(config.rule, difference_column(config))


def difference_column(config: IdentifyConfig) -> str:
    """The column that p-values, intervals and stability are about: of the rule's comparison, or of the weighting."""
    if config.rule in COMPARISONS:
        return COMPARISONS[config.rule].columns[2]
    return SCORE_COLUMN[config.weighting]


def difference_name(config: IdentifyConfig) -> str:
    """What `difference_column` is, in words."""
    return COMPARISONS[config.rule].name if config.rule in COMPARISONS else _NAME_OF_WEIGHTING[config.weighting]


def bar_of(values: npt.ArrayLike, config: IdentifyConfig) -> float:
    """What an expert's value has to exceed, given those of all experts that it is compared with.

    `threshold`, or for the rules whose scores have no scale of their own `min_share` of the largest value; 0 where none is
    above it.
    """
    if not is_relative(config):
        return config.threshold
    return config.min_share * max(float(np.max(values)), 0.0)


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


def select(risk: Risk, config: IdentifyConfig, *, seed: int = 0) -> ExpertMasks:
    """The masks of all batches.

    Args:
        risk: from `identify`, in any row order.
        config: rule, weighting, thresholds and filters.
        seed: of rule `random`.

    Raises:
        InputError: no batch has any unsafe expert, or the table lacks a column that the configuration needs.
    """
    return select_from((table for _, table in batch_tables(risk)), config, seed=seed)


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
        selected |= select_batches(risk, config, seed=seed)
        layers |= set(np.unique(risk["layer"]).tolist())
        num_experts = max(num_experts, int(risk["expert"].max()) + 1)
        # For the message alone; a table need not have what its rule does not use.
        largest = max(largest, float(risk.get(ranking_column(config), empty).max()))
        smallest_p = min(smallest_p, float(risk.get("p_maxt", empty).min()))
    if not any(selected.values()):
        raise NothingSelected(
            nothing_selected(largest, smallest_p, config, len(selected), column=ranking_column(config))
        )
    in_order = {batch: selected[batch] for batch in sorted(selected)}
    return masks_from_experts(in_order, layers=sorted(layers), num_experts=num_experts)


def select_batches(risk: Risk, config: IdentifyConfig, *, seed: int = 0) -> dict[int, tuple[Expert, ...]]:
    """Per `batch_idx` its unsafe experts, the strongest first; any number of batches may have none."""
    return {batch: unsafe_experts(table, config, seed=seed) for batch, table in batch_tables(risk)}


def _score(table: pd.DataFrame, config: IdentifyConfig) -> str:
    column, by = difference_column(config), "rule" if config.rule in COMPARISONS else "weighting"
    require_column(table, column, f"identify.{by}={getattr(config, by)}")
    return column


def _top_routed(table: pd.DataFrame, config: IdentifyConfig, seed: int) -> tuple[Expert, ...]:
    ordered = _by_score(table[table["a_unsafe"] > 0], "a_unsafe")
    return _experts_of(ordered[ordered.groupby("layer").cumcount() < config.per_layer_quota])


def _largest(table: pd.DataFrame, config: IdentifyConfig, seed: int) -> tuple[Expert, ...]:
    """The `top_k` largest differences above the rule's bar."""
    column = _score(table, config)
    chosen = top_experts(table, threshold=bar_of(table[column], config), top_k=config.top_k, column=column)
    return filtered(chosen, table, config)


def _per_layer(table: pd.DataFrame, config: IdentifyConfig, seed: int) -> tuple[Expert, ...]:
    column = _score(table, config)
    ordered = _by_score(table[table[column] > config.threshold], column)
    ordered = ordered[ordered.groupby("layer").cumcount() < config.per_layer_quota]
    return filtered(_experts_of(ordered), table, config)


def _by_score(table: pd.DataFrame, column: str) -> pd.DataFrame:
    return table.sort_values([column, "layer", "expert"], ascending=[False, True, True])


def as_experts(layers: Iterable[int], experts: Iterable[int]) -> tuple[Expert, ...]:
    """The experts of two columns, in their order."""
    return tuple(Expert(int(layer), int(expert)) for layer, expert in zip(layers, experts, strict=True))


def _experts_of(table: pd.DataFrame) -> tuple[Expert, ...]:
    return as_experts(table["layer"].tolist(), table["expert"].tolist())


def by_layer_share(table: pd.DataFrame, column: str) -> pd.DataFrame:
    """One batch's table with `share`, each expert's part of its layer's total of the column, the largest first.

    A layer whose total is 0 has shares of 0; ties are ordered by (layer, expert).
    """
    share = table[column] / table.groupby("layer")[column].transform("sum")
    return _by_score(table.assign(share=share.fillna(0.0)), "share")


def _cumulative(column: str, setting: str) -> Callable[[pd.DataFrame, IdentifyConfig, int], tuple[Expert, ...]]:
    """A rule: per layer the fewest experts whose share of the column's layer sum reaches `top_p`."""

    def choose(table: pd.DataFrame, config: IdentifyConfig, seed: int) -> tuple[Expert, ...]:
        require_column(table, column, setting)
        ordered = by_layer_share(table, column)
        # An expert is needed while those before it do not reach top_p; its own share may go beyond.
        before = ordered.groupby("layer")["share"].cumsum() - ordered["share"]
        return _experts_of(ordered[(before < config.top_p - ROUNDING) & (ordered["share"] > 0)])

    return choose


def _random(table: pd.DataFrame, config: IdentifyConfig, seed: int) -> tuple[Expert, ...]:
    """As many experts of each layer as rule `risk_diff` gives, without regard to any number."""
    matched = _largest(table, config, seed)
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
    "risk_diff": Rule("SteerMoE's risk difference (Fayyaz et al. 2025), per batch: above threshold, top_k", _largest),
    "per_layer": Rule(
        "the same difference with an equal quota for every layer, so that no layer takes all", _per_layer
    ),
    "attribution": Rule(
        "weight attribution: |w * dL/dw| of the loss of the model's own answers (RASA, Liang et al. 2026; SNIP, Lee et al. "
        "2019), unsafe minus safe prompts",
        _largest,
    ),
    "gate": Rule(
        "gate attribution: derivative of the answer's loss by a gate on each expert (as Michel et al. 2019 on heads), at "
        "halved gates, unsafe minus safe prompts",
        _largest,
    ),
    "gate_refuse": Rule("the same gate attribution, of the answer minus of the refusal of the same prompt", _largest),
    "comply_refuse": Rule(
        "comply versus refuse on the same unsafe prompts (SteerMoE, Fayyaz et al. 2025; RASA): difference of answer tokens",
        _largest,
    ),
    "reap": Rule(
        "REAP saliency (Lasby et al. 2025): mean router weight x output length of its tokens, unsafe minus safe prompts",
        _largest,
    ),
    "top_routed": Rule(
        "MoE-Sieve (Manzoni 2026): the experts of each layer with the most unsafe tokens, as many of every layer",
        _top_routed,
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
