"""Permutation tests of a batch's risk differences, with the prompt as the unit.

Tokens of one prompt are not independent, so labels are exchanged between prompts (inside pairs where there are pairs),
never between tokens. The difference of pooled rates is linear in the label vector once each expert's counts are centred
at its overall rate, so all relabellings of a batch are one matrix product.

The test is one-sided, as the selection is: large positive differences count. Each difference is divided by its
prompt-clustered standard error, with residuals about each label's own rate, computed anew for every relabelling, for two
reasons. Experts that vary a lot from prompt to prompt then don't set the bar for all others, as they would with raw
differences. And unsafe prompts are often longer, or fewer: a standard error under the hypothesis of no difference, about
one rate of all prompts, is wrong for either label where the few have the long prompts, and gave false alarms in up to half
of all null batches (`docs/statistics.md` has the table). With as many safe prompts as unsafe ones, all of one length, both
rank relabellings alike, as the two-sample t statistic does.

A label's own error has a fault of its own where the few have the short prompts: it then hangs on few noisy residuals, is
often too small by chance, and alarmed in a quarter of null batches, where the one about one rate hardly ever does. So with
unlike numbers of prompts both are computed, and p is the larger one.

Shape suffixes: N examples, X experts of all layers, P relabellings.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from moe_ray.identification.relabelling_counts import count_relabellings
from moe_ray.identification.relabellings import Relabellings, canonical_order, relabellings
from moe_ray.identification.risk import Floats
from moe_ray.identification.samples import Samples
from moe_ray.identification.studentised import Studentised, about_one_rate, studentised


@dataclass(frozen=True, kw_only=True)
class PermutationTest:
    """One-sided p-values of a batch.

    Attributes:
        p_X: (X,) share of relabellings with a studentised difference as large as the observed one; never 0.
        p_maxt_X: (X,) share of relabellings in which the largest studentised difference of all experts is as large as this
            expert's: the chance of a single false alarm among all experts.
        maxima_P: (relabellings,) that largest studentised difference, ascending; infinite where a standard error is 0.
        maxima_about_one_rate_P: the same with the standard error about one rate; None where only own rates are looked at.
        is_exact: all relabellings were used.
    """

    p_X: Floats
    p_maxt_X: Floats
    maxima_P: Floats
    maxima_about_one_rate_P: Floats | None
    is_exact: bool

    def __repr__(self) -> str:
        num, how = len(self.maxima_P), "all" if self.is_exact else "drawn"
        return (
            f"PermutationTest({len(self.p_X)} experts, {num} relabellings ({how}), smallest {self.p_maxt_X.min():.3g})"
        )


def permutation_test(samples: Samples, *, limit: int = 20_000, seed: int = 0, compiled: bool = True) -> PermutationTest:
    """Exact where a batch has no more than `limit` relabellings, else from `limit` drawn by `seed`.

    Source: Westfall & Young (1993), single-step maxT; p = (b + 1) / (m + 1) after Phipson & Smyth (2010), where the
    observed labels are the one relabelling in both; studentised after Janssen (1997) and Chung & Romano (2013).

    Args:
        samples: of a batch.
        limit: most relabellings.
        seed: of drawn ones.
        compiled: see `count_relabellings`; changes no result.
    """
    order, strata = canonical_order(samples.is_unsafe_N, samples.groups_N)
    labels = relabellings(strata, limit, seed)
    statistic = studentised(samples, labels, order)
    p_X, p_maxt_X, maxima_P = _p_values(statistic, labels, compiled)
    others_P = None
    if not labels.is_mirrored and not statistic.has_pairs:
        one_rate = about_one_rate(samples, labels, order)
        other_p_X, other_p_maxt_X, others_P = _p_values(one_rate, labels, compiled)
        p_X, p_maxt_X = np.maximum(p_X, other_p_X), np.maximum(p_maxt_X, other_p_maxt_X)
    return PermutationTest(
        p_X=p_X, p_maxt_X=p_maxt_X, maxima_P=maxima_P, maxima_about_one_rate_P=others_P, is_exact=labels.is_exact
    )


def _p_values(statistic: Studentised, labels: Relabellings, compiled: bool) -> tuple[Floats, Floats, Floats]:
    """(X,) p, (X,) corrected p, and the largest studentised difference of each relabelling, ascending."""
    counts = count_relabellings(statistic, labels, compiled=compiled)
    maxima_P = np.sort(counts.maxima_P)
    above_X = labels.num - np.searchsorted(maxima_P, counts.bound_X, side="left")
    return counts.hits_X / labels.num, above_X / labels.num, statistic.as_t(maxima_P)
