"""Identification of one batch at a time: its risk table with how sure each number is.

One call handles one batch and depends on nothing else but the configuration and the seed, so batches may be spread over
any number of workers and the table is the same.

Shape suffixes: N examples, X experts of all layers.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, cast

import numpy as np
import numpy.typing as npt
import pandas as pd

from moe_ray.errors import InputError
from moe_ray.experts import ExpertMasks
from moe_ray.identification.permutation_test import Samples, permutation_test
from moe_ray.identification.risk import ExampleCounts, Floats, example_counts, risk_table
from moe_ray.identification.selection import above_alpha
from moe_ray.identification.significance import cluster_interval, q_values, selection_stability, smallest_effect

if TYPE_CHECKING:
    from moe_ray.config.identify import IdentifyConfig
    from moe_ray.routing.counts import RoutingCounts

CERTAINTY_COLUMNS = ("p", "p_maxt", "q", "ci_low", "ci_high", "stability", "certifiable")

USUAL_ALPHA = 0.05

"""Level at which reports speak of certainty while `identify.alpha` is off."""


def identify_batch(
    counts: RoutingCounts, selection: IdentifyConfig, *, seed: int = 0, pairs: npt.ArrayLike | None = None
) -> pd.DataFrame:
    """The risk table of one batch: a row per layer and expert, ordered so.

    Args:
        counts: rows of one batch, in any order; `pair` and `weights_NLE` are used where the counts have them.
        selection: weighting, roles, and how many relabellings and resamples.
        seed: of drawn relabellings and resamples.
        pairs: per row of `counts`, text that the examples of a pair share; empty or None for single examples.

    Returns:
        the columns of `risk_differences`; `risk_diff_prompt`, the difference of mean rates with equal weight per prompt;
        with routed weights also `w_safe`, `w_unsafe` (their sums) and `risk_diff_activation` (difference of weight per
        token). About the difference that `identify.weighting` names: `p`, one-sided permutation p; `p_maxt`, corrected
        for all experts of the batch; `q`, Benjamini-Hochberg; `ci_low`, `ci_high`, 95% interval with prompts as
        clusters; `stability`, share of prompt resamples in which the expert is above `threshold` and in the `top_k`;
        `certifiable`, the smallest difference this batch could have certified at 0.05, infinite where none. What is
        switched off is NaN. With weighting `prompts` and one label's prompts several times longer, `p_maxt` is too small:
        0.05 gave a false alarm in 12% of simulated null batches, against 1 to 3% with weighting `tokens`.

    Raises:
        InputError: the rows are of several batches, a label is missing, or the weighting needs weights that were not
            captured.
    """
    batches = list(example_counts(counts, roles=selection.roles, pairs=pairs))
    if len(batches) != 1:
        names = [batch.batch_idx for batch in batches][:20]
        raise InputError(f"identify_batch: got rows of batches {names}, expected one; use identify for many batches")
    return _identify(batches[0], counts.layers, selection, seed)


def identify(
    counts: RoutingCounts, selection: IdentifyConfig, *, seed: int = 0, pairs: npt.ArrayLike | None = None
) -> pd.DataFrame:
    """`identify_batch` of every batch, in one table ordered by `batch_idx`."""
    batches = example_counts(counts, roles=selection.roles, pairs=pairs)
    return pd.concat([_identify(batch, counts.layers, selection, seed) for batch in batches], ignore_index=True)


def _identify(batch: ExampleCounts, layers: tuple[int, ...], selection: IdentifyConfig, seed: int) -> pd.DataFrame:
    table = risk_table([batch], layers)
    table["risk_diff_prompt"] = samples_of(batch, "prompts").difference()
    if batch.weights_NX is not None:
        table["w_safe"] = batch.weights_NX[~batch.is_unsafe_N].sum(axis=0)
        table["w_unsafe"] = batch.weights_NX[batch.is_unsafe_N].sum(axis=0)
        table["risk_diff_activation"] = samples_of(batch, "activation").difference()
    certainty = _certainty(samples_of(batch, selection.weighting), batch.batch_idx, selection, seed)
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
        if batch.weights_NX is None:
            raise InputError(
                "identify.weighting=activation: the routing counts hold no routed weights; capture them, or use "
                "identify.weighting=tokens"
            )
        values_NX = batch.weights_NX
    return Samples.of(values_NX, sizes_N, batch.is_unsafe_N, batch.pairs_N)


def _certainty(samples: Samples, batch_idx: int, selection: IdentifyConfig, seed: int) -> dict[str, Floats]:
    columns: dict[str, Floats] = {}
    columns["ci_low"], columns["ci_high"] = cluster_interval(samples)
    if selection.permutations:
        test = permutation_test(samples, limit=selection.permutations, seed=seed)
        columns |= {"p": test.p_X, "p_maxt": test.p_maxt_X, "q": q_values(test.p_X)}
        columns["certifiable"] = smallest_effect(samples, test, alpha=USUAL_ALPHA)
    if selection.resamples:
        columns["stability"] = selection_stability(
            samples,
            threshold=selection.threshold,
            top_k=selection.top_k,
            resamples=selection.resamples,
            seed=int(np.random.SeedSequence([seed, batch_idx]).generate_state(1)[0]),
        )
    return columns


def certainty_per_batch(risk: pd.DataFrame, masks: ExpertMasks, selection: IdentifyConfig) -> pd.DataFrame:
    """One row per batch: how much of its selection is significant.

    Args:
        risk: from `identify`.
        masks: selected from it.
        selection: the configuration of both.

    Returns:
        columns `batch_idx, num_selected`; `num_significant`, selected experts whose `p_maxt` is at most `identify.alpha`
        (0.05 while that is off); `smallest_p_maxt`; `median_stability` of the selected; `certifiable`, the median over
        experts of the smallest difference the batch could have certified at 0.05, infinite where that is none;
        `is_significant`, whether `num_significant` is above 0 (None where no p was computed).
    """
    alpha = selection.alpha or USUAL_ALPHA
    rows = []
    for batch_idx, table in risk.groupby("batch_idx", sort=True):
        name = int(cast(int, batch_idx))
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
