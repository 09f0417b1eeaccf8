"""What is left of a selection when only prompts of one topic, or of one template, are compared: harm within strata.

Unsafe prompts may be about other things than safe ones, and experts that follow the topic are then routed more on unsafe
prompts, as if they followed harm. Where prompts say their topic (or template), a batch is a table of topic x label, and an
expert's difference can be taken inside each topic and averaged:

    harm within      = mean over levels of (rate on the level's unsafe prompts - rate on its safe ones)
    factor           = how far the levels' rates lie from each other, within a label: root mean square about their mean, mean
                       over both labels
    interaction      = how far the levels' harm effects lie from each other: the same, of the differences

Only levels with prompts of both labels can be compared; the others are left out. p relabels prompts within levels only
(and within pairs), so a topic that goes with the label cannot make it small; each relabelling's value is divided by the
expert's own standard deviation over all of them, and the largest over all experts of the batch counts (maxT), so that a
selected expert is not called certain because it was the largest of many.

Source: stratified permutation (Good 2005, "Permutation, Parametric and Bootstrap Tests of Hypotheses", 6.2); maxT: Westfall
& Young 1993.

Shape suffixes: N examples, X experts of all layers, S levels with both labels, P relabellings.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd

from moe_ray.config.identify import IdentifyConfig
from moe_ray.experts import Expert
from moe_ray.identification.identify import USUAL_ALPHA, samples_of
from moe_ray.identification.relabellings import canonical_order, relabellings
from moe_ray.identification.risk import Floats, example_counts
from moe_ray.identification.samples import Samples
from moe_ray.routing.counts import RoutingCounts

FACTORS = ("topic", "template")
"""Fields of prompts that an expert may follow instead of harm."""

CONTROLS = "controls.parquet"
"""Of a finished identification, in the stage's folder: the table of `controls_of_batches`."""

MOST_RELABELLINGS = 2_000
"""Enough to tell p of 0.05, and few enough to hold those of all experts."""

_SAME = 1e-12


@dataclass(frozen=True, kw_only=True)
class ControlledEffects:
    """What is seen of a batch's experts inside the levels of a factor.

    Attributes:
        harm_X: (X,) mean over levels of the risk difference within.
        factor_X: (X,) how far levels' rates differ within a label.
        interaction_X: (X,) how far levels' risk differences differ.
        p_maxt_X: (X,) of `harm_X`, one-sided, corrected for all experts of the batch; NaN where none was asked for.
        num_levels: with prompts of both labels.
        num_prompts: in them.
    """

    harm_X: Floats
    factor_X: Floats
    interaction_X: Floats
    p_maxt_X: Floats
    num_levels: int
    num_prompts: int


def controlled_effects(
    samples: Samples, levels_N: npt.NDArray[np.object_], *, limit: int = MOST_RELABELLINGS, seed: int = 0
) -> ControlledEffects | None:
    """Effects within the levels of a factor; None where no level has prompts of both labels.

    Args:
        samples: of a batch.
        levels_N: (N,) the level of each example; empty = it has none.
        limit: most relabellings; 0 = no test.
        seed: of drawn ones.
    """
    unsafe_N = samples.is_unsafe_N
    whole = [
        level
        for level in sorted({str(level) for level in levels_N if level})
        if len(set(unsafe_N[levels_N == level].tolist())) == 2
    ]
    if not whole:
        return None
    used = np.flatnonzero(np.isin(levels_N.astype(str), whole))
    level_n = np.searchsorted(np.asarray(whole), levels_N[used].astype(str))
    kept = Samples(
        values_NX=samples.values_NX[used],
        sizes_N=samples.sizes_N[used],
        is_unsafe_N=unsafe_N[used],
        groups_N=samples.groups_N[used],
    )
    rates_SX = {label: _rates(kept, level_n, len(whole), kept.is_unsafe_N == label) for label in (True, False)}
    harm_SX = rates_SX[True] - rates_SX[False]
    return ControlledEffects(
        harm_X=harm_SX.mean(axis=0),
        factor_X=np.mean([rates.std(axis=0) for rates in rates_SX.values()], axis=0),
        interaction_X=harm_SX.std(axis=0),
        p_maxt_X=_p_maxt(kept, level_n, len(whole), limit, seed) if limit else np.full(harm_SX.shape[1], np.nan),
        num_levels=len(whole),
        num_prompts=len(used),
    )


def _rates(
    samples: Samples, level_N: npt.NDArray[np.int64], num_levels: int, chosen_N: npt.NDArray[np.bool_]
) -> Floats:
    """(S, X) summed values / summed sizes of the chosen examples of each level."""
    member_SN = (level_N == np.arange(num_levels)[:, None]) & chosen_N
    return np.asarray((member_SN @ samples.values_NX) / (member_SN @ samples.sizes_N)[:, None])


def _p_maxt(samples: Samples, level_N: npt.NDArray[np.int64], num_levels: int, limit: int, seed: int) -> Floats:
    """(X,) share of relabellings within levels in which the largest standardised effect reaches each expert's own."""
    _, groups_N = np.unique(np.stack([level_N, _whole_pairs(samples, level_N)]), axis=1, return_inverse=True)
    order, strata = canonical_order(samples.is_unsafe_N, groups_N.ravel())
    labels = relabellings(strata, limit, seed)
    unsafe_PN = labels.unsafe_NP.T.astype(np.float64)
    values_NX, sizes_N, level_N = samples.values_NX[order], samples.sizes_N[order], level_N[order]
    effect_PX = np.zeros((len(unsafe_PN), values_NX.shape[1]))
    for level in range(num_levels):
        own = level_N == level
        unsafe_Pn = unsafe_PN[:, own]
        values_nX, sizes_n = values_NX[own], sizes_N[own]
        effect_PX += (unsafe_Pn @ values_nX) / (unsafe_Pn @ sizes_n)[:, None]
        effect_PX -= ((1 - unsafe_Pn) @ values_nX) / ((1 - unsafe_Pn) @ sizes_n)[:, None]
    # About 0, which is the mean over relabellings: exactly where opposites are among them, which only count half of it.
    spread_X = np.sqrt(np.square(effect_PX).mean(axis=0))
    standard_PX = np.divide(effect_PX, spread_X, out=np.zeros_like(effect_PX), where=spread_X > _SAME)
    maxima_P = standard_PX.max(axis=1)
    if labels.is_mirrored:
        maxima_P = np.concatenate([maxima_P, (-standard_PX).max(axis=1)])
    maxima_P.sort()
    reached_X = len(maxima_P) - np.searchsorted(maxima_P, standard_PX[0] - _SAME, side="left")
    return np.asarray(reached_X / len(maxima_P))


def _whole_pairs(samples: Samples, level_N: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    """(N,) the pair of each example whose pair lies within one level with both labels; 0 for the others."""
    pairs_N = samples.groups_N.copy()
    for pair in np.unique(pairs_N[pairs_N > 0]):
        own = pairs_N == pair
        if len(set(level_N[own].tolist())) > 1 or len(set(samples.is_unsafe_N[own].tolist())) < 2:
            pairs_N[own] = 0
    return pairs_N


def controls_of_batches(
    counts: RoutingCounts,
    fields: pd.DataFrame,
    selected: Mapping[int, Iterable[Expert]],
    config: IdentifyConfig,
    *,
    seed: int = 0,
) -> pd.DataFrame:
    """One row per batch, factor and selected expert: what is left of its risk difference within the factor's levels.

    Args:
        counts: of any number of batches.
        fields: rows with `batch_idx`, `in_batch_idx`, and `topic` and `template` (text, empty or None where unknown).
        selected: per `batch_idx` its unsafe experts.
        config: roles, weighting, threshold, and how many relabellings; at most `MOST_RELABELLINGS` are used.
        seed: of drawn relabellings.

    Returns:
        columns `batch_idx, factor, layer, expert`; `risk_diff`, of the whole batch; `harm`, `effect`, `interaction`: see
        the module; `p_maxt`; `levels` and `prompts` that could be compared; `is_above`, whether `harm` is above
        `config.threshold`; `survives`, whether it also has a `p_maxt` of at most `config.alpha` (0.05 while that is off);
        without a test the two are the same. Batches without a level of both labels, or with too few such prompts for any
        expert to be significant, have no row.
    """
    rows: list[dict[str, Any]] = []
    limit = min(config.permutations, MOST_RELABELLINGS)
    for batch in example_counts(counts, roles=config.roles):
        counted = (
            (counts.batch_idx == batch.batch_idx) & np.isin(counts.role, list(config.roles)) & (counts.num_tokens > 0)
        )
        places = np.unique(counts.in_batch_idx[counted])
        of_batch = fields[fields["batch_idx"] == batch.batch_idx].set_index("in_batch_idx").reindex(places)
        samples = samples_of(batch, config.weighting)
        for factor in FACTORS:
            levels_N = of_batch[factor].astype(object).fillna("").to_numpy(dtype=object)
            found = controlled_effects(samples, levels_N, limit=limit, seed=seed)
            if found is not None and (not limit or _could_tell(samples, levels_N, config.alpha or USUAL_ALPHA)):
                rows += _rows(batch.batch_idx, factor, found, samples, counts, selected[batch.batch_idx], config)
    return pd.DataFrame(rows, columns=COLUMNS)


def _could_tell(samples: Samples, levels_N: npt.NDArray[np.object_], alpha: float) -> bool:
    """Whether labels can fall in enough ways within levels for the smallest p to be at most `alpha`."""
    ways = 1
    for level in {str(level) for level in levels_N if level}:
        unsafe_n = samples.is_unsafe_N[levels_N == level]
        ways *= math.comb(len(unsafe_n), int(unsafe_n.sum()))
    return ways * alpha >= 1


COLUMNS = (
    *("batch_idx", "factor", "layer", "expert", "risk_diff", "harm", "effect", "interaction", "p_maxt", "levels"),
    *("prompts", "is_above", "survives"),
)


def _rows(
    batch_idx: int,
    factor: str,
    found: ControlledEffects,
    samples: Samples,
    counts: RoutingCounts,
    experts: Iterable[Expert],
    config: IdentifyConfig,
) -> list[dict[str, Any]]:
    risk_diff_X, num_experts = samples.difference(), counts.counts_NLE.shape[2]
    rows = []
    for layer, expert in experts:
        x = counts.layers.index(layer) * num_experts + expert
        p, is_above = float(found.p_maxt_X[x]), bool(found.harm_X[x] > config.threshold)
        rows.append(
            {
                "batch_idx": batch_idx,
                "factor": factor,
                "layer": layer,
                "expert": expert,
                "risk_diff": float(risk_diff_X[x]),
                "harm": float(found.harm_X[x]),
                "effect": float(found.factor_X[x]),
                "interaction": float(found.interaction_X[x]),
                "p_maxt": p,
                "levels": found.num_levels,
                "prompts": found.num_prompts,
                "is_above": is_above,
                "survives": is_above and not p > (config.alpha or USUAL_ALPHA),
            }
        )
    return rows


def survival(table: pd.DataFrame, num_batches: int) -> dict[str, dict[str, int]]:
    """How much of the selection survives each control, over all batches.

    Args:
        table: from `controls_of_batches`.
        num_batches: that were looked at.

    Returns:
        per factor that could be controlled for: `selected` experts, batch by batch; `above`, those whose difference within
        is above the threshold; `survive`, those that are significant as well; `batches`, in how many it could be controlled;
        `not_controlled`, in how many not.
    """
    found = {}
    for factor in FACTORS:
        own = table[table["factor"] == factor]
        batches = int(own["batch_idx"].nunique())
        if batches:
            found[factor] = {
                "selected": len(own),
                "above": int(own["is_above"].sum()),
                "survive": int(own["survives"].sum()),
                "batches": batches,
                "not_controlled": num_batches - batches,
            }
    return found
