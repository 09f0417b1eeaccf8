"""Identification: the risk table of every batch, with how sure each number is.

A batch's rows depend on that batch, the configuration and the seed alone, so batches may be spread over any number of
workers and the table is the same.

Shape suffixes: N examples, X experts of all layers.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
import numpy.typing as npt
import pandas as pd

from moe_ray.config.identify import IdentifyConfig
from moe_ray.errors import InputError
from moe_ray.experts import ExpertMasks
from moe_ray.identification.comparisons import (
    COMPARISONS,
    Comparison,
    captured_comparisons,
    compared,
    is_relative,
)
from moe_ray.identification.filters import above_alpha
from moe_ray.identification.permutation_test import permutation_test
from moe_ray.identification.risk import ExampleCounts, Floats, activation_rates, example_counts
from moe_ray.identification.risk_tables import Risk, batch_tables
from moe_ray.identification.samples import Samples
from moe_ray.identification.significance import cluster_interval, q_values, selection_stability, smallest_effect
from moe_ray.routing.counts import RoutingCounts

CERTAINTY_COLUMNS = ("p", "p_maxt", "q", "ci_low", "ci_high", "stability", "certifiable")
STATISTIC = "own_rates"
"""What the tests divide by. Tables with p-values of another statistic are made anew."""
USUAL_ALPHA = 0.05
"""Level at which reports speak of certainty while `identify.alpha` is off."""


def identify(counts: RoutingCounts, config: IdentifyConfig, *, seed: int = 0) -> pd.DataFrame:
    """The risk table: a row per batch, layer and expert, ordered so.

    Args:
        counts: of any number of batches, rows in any order; `pair` and `weights_NLE` are used where the counts have them.
        config: weighting, roles, and how many relabellings and resamples.
        seed: of drawn relabellings and resamples.

    Returns:
        the columns of `activation_rates`; `risk_diff_prompt`, the difference of mean rates with equal weight per prompt;
        with routed weights also `w_safe`, `w_unsafe` (their sums) and `risk_diff_activation` (difference of rates in which
        routed tokens count by weight, see `shared_by_weight`); for each captured score of `COMPARISONS` the means of both
        sides and their difference, NaN where a side has no example. About the difference that `identify.rule` and
        `identify.weighting` name, see `difference_column`: `p`, one-sided permutation p; `p_maxt`, corrected for all experts
        of the batch; `q`, Benjamini-Hochberg; `ci_low`, `ci_high`, 95% interval with prompts as clusters; `stability`, share
        of prompt resamples in which the expert is above the rule's bar and in the `top_k`; `certifiable`, the smallest
        difference this batch could have certified at 0.05, infinite where none. What is switched off is NaN. With weighting
        `prompts` and one label's prompts several times longer, `p_maxt` is too small: 0.05 gave a false alarm in 12% of
        simulated null batches, against 1 to 3% with weighting `tokens`.

    Raises:
        InputError: there are no rows in these roles, a batch lacks a label, the weighting or the rule needs what was not
            captured, or a batch lacks the answers that the rule compares.
    """
    comparisons = captured_comparisons(counts, config)
    batches = example_counts(counts, roles=config.roles)
    tables = [_identify(batch, counts, comparisons, config, seed) for batch in batches]
    return pd.concat(tables, ignore_index=True)


def _identify(
    batch: ExampleCounts,
    counts: RoutingCounts,
    comparisons: tuple[Comparison, ...],
    config: IdentifyConfig,
    seed: int,
) -> pd.DataFrame:
    table = activation_rates(batch, counts.layers)
    table["risk_diff_prompt"] = samples_of(batch, "prompts").difference()
    if batch.weights_NX is not None:
        table["w_safe"] = batch.weights_NX[~batch.is_unsafe_N].sum(axis=0)
        table["w_unsafe"] = batch.weights_NX[batch.is_unsafe_N].sum(axis=0)
        table["risk_diff_activation"] = samples_of(batch, "activation").difference()
    for comparison in comparisons:
        found = comparison.samples(batch, config)
        # Without values still a column: all tables of a run have the same ones.
        values = np.nan if found is None else np.column_stack([*found.rates(), found.difference()])
        table[list(comparison.columns)] = values
    samples = compared(batch, config) if config.rule in COMPARISONS else samples_of(batch, config.weighting)
    # A token that gives all its weight to one of its k experts counts k times there.
    most = counts.num_experts_per_tok if config.weighting == "activation" and config.rule not in COMPARISONS else 1
    certainty = _certainty(samples, batch.batch_idx, config, seed, most=float(most))
    return table.assign(**{name: certainty.get(name, np.nan) for name in CERTAINTY_COLUMNS})


def samples_of(batch: ExampleCounts, weighting: str) -> Samples:
    """What a weighting compares, see `identify.weighting`.

    Raises:
        InputError: `activation` is asked for and routed weights were not captured.
    """
    values_NX: npt.NDArray[np.generic] = batch.counts_NX
    sizes_N = batch.tokens_N.astype(np.float64)
    if weighting == "prompts":
        values_NX, sizes_N = batch.counts_NX / sizes_N[:, None], np.ones_like(sizes_N)
    elif weighting == "activation":
        if batch.shared_NX is None:
            raise InputError(
                "identify.weighting=activation: the routing counts hold no routed weights; capture them, or use "
                "identify.weighting=tokens"
            )
        values_NX = batch.shared_NX
    return Samples.of(values_NX, sizes_N, batch.is_unsafe_N, batch.pairs_N)


def _certainty(
    samples: Samples, batch_idx: int, config: IdentifyConfig, seed: int, *, most: float
) -> dict[str, Floats]:
    columns: dict[str, Floats] = {}
    unit = 1.0
    if is_relative(config):
        # In units of the largest value, so that rounding is as small beside them as beside rates; a difference has no bound.
        unit, most = float(np.abs(samples.values_NX).max()) or 1.0, np.inf
        samples = replace(samples, values_NX=samples.values_NX / unit)
    low_X, high_X = cluster_interval(samples, most=most)
    columns["ci_low"], columns["ci_high"] = low_X * unit, high_X * unit
    if config.permutations:
        test = permutation_test(samples, limit=config.permutations, seed=seed, compiled=config.compiled)
        columns |= {"p": test.p_X, "p_maxt": test.p_maxt_X, "q": q_values(test.p_X)}
        columns["certifiable"] = smallest_effect(samples, test, alpha=USUAL_ALPHA, most=most) * unit
    if config.resamples:
        columns["stability"] = selection_stability(
            samples,
            threshold=config.min_share if is_relative(config) else config.threshold,
            is_relative=is_relative(config),
            top_k=config.top_k,
            resamples=config.resamples,
            # By batch, or the same prompts' positions would be drawn in every batch, and luck with them would repeat.
            seed=int(np.random.SeedSequence([seed, batch_idx]).generate_state(1)[0]),
        )
    return columns


@dataclass(frozen=True, kw_only=True)
class Identification:
    """What identification found.

    Attributes:
        risk: the risk table, from `identify`.
        masks: the unsafe experts of every batch, selected from it.
        config: the settings of both.
    """

    risk: pd.DataFrame
    masks: ExpertMasks
    config: IdentifyConfig

    def __repr__(self) -> str:
        is_significant = self.certainty["is_significant"]
        certain = f"{int(is_significant.sum())} significant" if is_significant.notna().all() else "not tested"
        return f"Identification({len(is_significant)} batches, {certain}, {self.masks!r})"

    @cached_property
    def certainty(self) -> pd.DataFrame:
        """How much of each batch's selection is significant, from `certainty_per_batch`."""
        return certainty_per_batch(self.risk, self.masks, self.config)

    def to_frame(self) -> pd.DataFrame:
        """The risk table, and whether each expert `is_selected`."""
        chosen = pd.MultiIndex.from_frame(self.masks.to_frame()[_EXPERT_OF_BATCH])
        return self.risk.assign(is_selected=pd.MultiIndex.from_frame(self.risk[_EXPERT_OF_BATCH]).isin(chosen))


_EXPERT_OF_BATCH = ["batch_idx", "layer", "expert"]


def certainty_per_batch(risk: Risk, masks: ExpertMasks, config: IdentifyConfig) -> pd.DataFrame:
    """One row per batch: how much of its selection is significant.

    Args:
        risk: from `identify`.
        masks: selected from it.
        config: the configuration of both.

    Returns:
        columns `batch_idx, num_selected`; `num_significant`, selected experts whose `p_maxt` is at most `identify.alpha`
        (0.05 while that is off); `smallest_p_maxt`; `median_stability` of the selected; `certifiable`, the median over
        experts of the smallest difference the batch could have certified at 0.05, infinite where that is none;
        `is_significant`, whether `num_significant` is above 0 (None where no p was computed).
    """
    alpha = config.alpha or USUAL_ALPHA
    rows = []
    for name, table in batch_tables(risk, ["p_maxt", "stability", "certifiable"]):
        table = table.sort_values(["layer", "expert"])
        selected = table[masks[name].ravel()]
        tested = bool(table["p_maxt"].notna().any())
        num_significant = len(selected) - int(above_alpha(selected["p_maxt"], alpha).sum()) if tested else 0
        rows.append(
            {
                "batch_idx": name,
                "num_selected": len(selected),
                "num_significant": num_significant,
                "smallest_p_maxt": float(table["p_maxt"].min()),
                "median_stability": float(selected["stability"].median()) if len(selected) else np.nan,
                "certifiable": float(table["certifiable"].median()),
                "is_significant": num_significant > 0 if tested else None,
            }
        )
    return pd.DataFrame(rows)
