"""How certain a selection is, in words."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import cast

import numpy as np
import pandas as pd

from moe_ray.chat_messages import prompt_text
from moe_ray.config.identify import IdentifyConfig
from moe_ray.identification.comparisons import is_relative
from moe_ray.identification.confounds import confound_warnings
from moe_ray.identification.identify import USUAL_ALPHA
from moe_ray.identification.selection import difference_name
from moe_ray.report.format import significant_digits
from moe_ray.report.printable import printable
from moe_ray.routing.counts import RoutingCounts


def significance_level(selection: IdentifyConfig) -> float:
    """The level at which an expert is called significant: `identify.alpha`, or 0.05 while that is off."""
    return selection.alpha or USUAL_ALPHA


def known_significance(certainty: pd.DataFrame) -> pd.Series:
    """Whether each batch's selection is significant, for the batches that a p was computed of.

    Args:
        certainty: from `certainty_per_batch`.
    """
    known = certainty["is_significant"]
    return known[known.notna()].astype(bool)


def certainty_in_words(certainty: pd.DataFrame, selection: IdentifyConfig) -> list[str]:
    """One sentence on all batches, then one per batch.

    Args:
        certainty: from `certainty_per_batch`.
        selection: what it was computed with.
    """
    tested = known_significance(certainty)
    if tested.empty:
        return ["No significance was computed (identify.permutations=0), so nothing is said about noise."]
    significant, rest = int(tested.sum()), int((~tested).sum())
    head = (
        f"{significant} of {len(tested)} batches have at least one selected expert with corrected p of at most "
        f"{significance_level(selection):g} (permutation test over prompts, maxT over all experts of the batch)"
    )
    head += f"; in {rest} the selection is not distinguishable from noise." if rest else "."
    rows = certainty[certainty["is_significant"].notna()].to_dict("records")
    return [head, *(_batch_in_words(cast("Mapping[str, float]", row), selection) for row in rows)]


def _batch_in_words(row: Mapping[str, float], selection: IdentifyConfig) -> str:
    name, selected, smallest_p = f"Batch {row['batch_idx']}", row["num_selected"], row["smallest_p_maxt"]
    what, least = difference_name(selection), row["certifiable"]
    needed = (
        f"a {what} of {significant_digits(least) if is_relative(selection) else f'{least:.3f}'} or more would have been"
        if np.isfinite(least)
        else f"no {what}, however large, could have been"
    )
    reach = f"{needed} significant at a typical expert"
    if not selected:
        return f"{name}: no expert is selected; {reach}."
    if not row["is_significant"]:
        return (
            f"{name}: none of its {selected} selected experts is distinguishable from noise (smallest corrected p of any "
            f"expert {significant_digits(smallest_p)}); {reach}."
        )
    share = row["median_stability"]
    stable = "" if np.isnan(share) else f"the median one is selected in {share:.0%} of prompt resamples; "
    return (
        f"{name}: {row['num_significant']} of {selected} selected experts are significant (smallest corrected p "
        f"{significant_digits(smallest_p)}); {stable}{reach}."
    )


def describe_certainty(
    counts: RoutingCounts, certainty: pd.DataFrame, batches: pd.DataFrame, selection: IdentifyConfig
) -> str:
    """How sure the selection is: batches without significance, what weighting would change, and confounds.

    Args:
        counts: lengths at least, of the batches that have masks.
        certainty: of the run, with `jaccard`; see `findings.Findings`.
        batches: rows with `label` and `messages` (JSON), one per example.
        selection: the configuration of all.
    """
    texts = batches[["label"]].assign(text=[prompt_text(json.loads(messages)) for messages in batches["messages"]])
    agreement = certainty["jaccard"].mean()
    not_significant = certainty.loc[certainty["is_significant"].eq(False), "batch_idx"].tolist()
    lines = certainty_in_words(certainty, selection)[:1]
    if not_significant:
        lines.append(f"Batches whose selection is not distinguishable from noise: {not_significant}")
    by_risk = "" if selection.rule in ("risk_diff", "per_layer", "random") else "By risk difference alone, the"
    lines.append(
        f"{by_risk or 'The'} experts selected from pooled tokens and those selected with equal weight per prompt overlap by "
        f"{agreement:.0%} (mean Jaccard index over batches)."
    )
    lines += [f"Warning: {warning}" for warning in confound_warnings(counts, texts, roles=selection.roles)]
    return "\n".join(printable(line) for line in lines)
