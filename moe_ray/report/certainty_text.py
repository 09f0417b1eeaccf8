"""How certain a selection is, in words."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import cast

import numpy as np
import pandas as pd

from moe_ray.config.identify import IdentifyConfig
from moe_ray.experts import ExpertMasks
from moe_ray.identification.confounds import confound_warnings, weighting_agreement
from moe_ray.identification.identify import USUAL_ALPHA, certainty_per_batch
from moe_ray.messages import prompt_text
from moe_ray.report.printable import printable
from moe_ray.routing.counts import RoutingCounts


def certainty_in_words(certainty: pd.DataFrame, selection: IdentifyConfig) -> list[str]:
    """One sentence per batch of `certainty_per_batch`, and one on all of them first."""
    tested = certainty[certainty["is_told_from_noise"].notna()]
    if tested.empty:
        return ["No significance was computed (identify.permutations=0), so nothing is said about noise."]
    noisy = int((~tested["is_told_from_noise"].astype(bool)).sum())
    level = selection.alpha or USUAL_ALPHA
    head = (
        f"{len(tested) - noisy} of {len(tested)} batches have at least one selected expert with corrected p of at most "
        f"{level:g} (prompts as the unit, maxT over all experts); in {noisy} the selection cannot be told from noise."
    )
    return [head, *(_batch_in_words(cast("Mapping[str, float]", row)) for row in tested.to_dict("records"))]


def _batch_in_words(row: Mapping[str, float]) -> str:
    name, certifiable = f"Batch {row['batch_idx']}", row["certifiable"]
    could = f"of {certifiable:.3f}" if np.isfinite(certifiable) else "of any size"
    reach = (
        f"it could {'have certified a' if np.isfinite(certifiable) else 'not have certified a'} risk difference {could}"
    )
    if not row["num_selected"]:
        return f"{name}: no expert is selected; {reach} at a typical expert."
    if row["is_told_from_noise"]:
        share = row["median_stability"]
        stable = "" if np.isnan(share) else f"the median one is selected in {share:.0%} of prompt resamples; "
        return (
            f"{name}: {row['num_certain']} of {row['num_selected']} selected experts are certain (smallest corrected p "
            f"{row['smallest_p_maxt']:.2g}); {stable}{reach} at a typical expert."
        )
    return (
        f"{name}: its {row['num_selected']} selected experts cannot be told from noise (smallest corrected p of any "
        f"expert {row['smallest_p_maxt']:.2g}); {reach} at a typical expert."
    )


def describe_certainty(
    counts: RoutingCounts, risk: pd.DataFrame, masks: ExpertMasks, batches: pd.DataFrame, selection: IdentifyConfig
) -> str:
    """How sure the selection is: batches that cannot be told from noise, confounds, and what weighting would change."""
    certainty = certainty_per_batch(risk, masks, selection)
    texts = batches[["label"]].assign(text=[prompt_text(json.loads(messages)) for messages in batches["messages"]])
    agreement = weighting_agreement(risk, selection)["jaccard"].mean()
    noisy = certainty.loc[certainty["is_told_from_noise"].eq(False), "batch_idx"].tolist()
    lines = certainty_in_words(certainty, selection)[:1]
    if noisy:
        lines.append(f"Batches that cannot be told from noise: {noisy}")
    lines.append(f"Equal weight per prompt instead of pooled tokens would keep {agreement:.0%} of a batch's selection.")
    lines += [f"Warning: {warning}" for warning in confound_warnings(counts, texts, roles=selection.roles)]
    return "\n".join(printable(line) for line in lines)
