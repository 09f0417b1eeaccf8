"""Confounds: what else than harm tells a batch's safe prompts from its unsafe ones.

Unsafe prompts are often longer, or all wear one jailbreak template; routing may follow that. Pooled tokens let the longest
prompts decide, equal weight per prompt lets templates decide; where both weightings choose the same experts, length is no
explanation.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pandas as pd

from moe_ray.config.identify import IdentifyConfig
from moe_ray.errors import InputError
from moe_ray.identification.risk import example_counts
from moe_ray.identification.risk_tables import Risk, batch_tables
from moe_ray.identification.selection import unsafe_experts
from moe_ray.routing.counts import RoutingCounts

MAX_LENGTH_RATIO = 3.0
"""Mean lengths that differ more than this are warned about."""

MIN_TEMPLATE_SHARE = 0.5
"""A template that makes up at least this share of a label's typical prompt covers the label."""

_PHRASE_WORDS = 4
_IN_MOST_PROMPTS = 0.8
_MIN_PROMPTS = 3


def length_table(counts: RoutingCounts, *, roles: Sequence[str] = ("prompt",)) -> pd.DataFrame:
    """One row per batch: `batch_idx, safe_tokens, unsafe_tokens` (mean tokens per example) and `ratio`, longer / shorter."""
    rows = []
    for batch in example_counts(counts, roles=roles):
        safe = float(batch.tokens_N[~batch.is_unsafe_N].mean())
        unsafe = float(batch.tokens_N[batch.is_unsafe_N].mean())
        ratio = max(safe, unsafe) / min(safe, unsafe)
        rows.append({"batch_idx": batch.batch_idx, "safe_tokens": safe, "unsafe_tokens": unsafe, "ratio": ratio})
    return pd.DataFrame(rows)


def template_share(texts: Sequence[str], others: Sequence[str] = ()) -> float:
    """Share (0 to 1) of a typical text that is wording which most of `texts` have in common and `others` have not.

    Wording is compared in runs of four words; one that is in at least 80% of `texts`, and not in most of `others`, belongs
    to a template. 0 for fewer than three texts.
    """
    if len(texts) < _MIN_PROMPTS:
        return 0.0
    phrases = [_phrases(text) for text in texts]
    common = _in_most(phrases) - _in_most([_phrases(text) for text in others])
    shares = [len(of_text & common) / len(of_text) for of_text in phrases if of_text]
    return float(np.median(shares)) if shares else 0.0


def _phrases(text: str) -> set[tuple[str, ...]]:
    words = text.lower().split()
    return {tuple(words[i : i + _PHRASE_WORDS]) for i in range(len(words) - _PHRASE_WORDS + 1)}


def _in_most(phrases: Sequence[set[tuple[str, ...]]]) -> set[tuple[str, ...]]:
    seen = Counter(phrase for of_text in phrases for phrase in of_text)
    return {phrase for phrase, times in seen.items() if times >= _IN_MOST_PROMPTS * len(phrases)}


def confound_warnings(
    counts: RoutingCounts, texts: pd.DataFrame | None = None, *, roles: Sequence[str] = ("prompt",)
) -> list[str]:
    """Sentences on lengths and templates that tell the labels apart; empty where there is nothing to say.

    Args:
        counts: of all batches.
        texts: rows with `label` and `text`, a prompt's whole wording; None leaves templates unchecked.
        roles: whose tokens are counted.
    """
    lengths = length_table(counts, roles=roles)
    far = lengths[lengths["ratio"] > MAX_LENGTH_RATIO]
    found = []
    if len(far):
        worst = far.sort_values("ratio").iloc[-1]
        found.append(
            f"mean lengths differ more than {MAX_LENGTH_RATIO:g}-fold in {len(far)} of {len(lengths)} batches (worst: "
            f"batch {int(worst['batch_idx'])}, {worst['safe_tokens']:.0f} tokens a safe and {worst['unsafe_tokens']:.0f} an "
            "unsafe prompt): routing may follow length; compare identify.weighting=prompts, or use prompts of like length"
        )
    return found + (_template_warnings(texts) if texts is not None else [])


def _template_warnings(texts: pd.DataFrame) -> list[str]:
    found = []
    by_label = {label: texts.loc[texts["label"] == label, "text"].tolist() for label in ("safe", "unsafe")}
    for label, other in (("safe", "unsafe"), ("unsafe", "safe")):
        share = template_share(by_label[label], by_label[other])
        if share >= MIN_TEMPLATE_SHARE:
            found.append(
                f"one template covers the {label} prompts: {share:.0%} of a typical one is wording that the {other} ones "
                f"lack, so experts may answer for the template; add {label} prompts without it, or {other} ones with it"
            )
    return found


def weighting_agreement(risk: Risk, config: IdentifyConfig) -> pd.DataFrame:
    """One row per batch: how much of the selection pooled tokens and equal weight per prompt share.

    Returns:
        the columns of `selections_by_weighting`, and `rank_correlation`, Spearman's, of both differences over all experts.

    Raises:
        InputError: the table has no `risk_diff_prompt`.
    """
    table = selections_by_weighting(risk, config)
    table["rank_correlation"] = [
        of_batch["risk_diff"].rank().corr(of_batch["risk_diff_prompt"].rank())
        for _, of_batch in batch_tables(risk, ["risk_diff", "risk_diff_prompt"])
    ]
    return table


def selections_by_weighting(risk: Risk, config: IdentifyConfig) -> pd.DataFrame:
    """One row per batch: what pooled tokens and equal weight per prompt select.

    Filters are off, since a table's p belongs to one weighting. For a rule that ranks by something else than a risk
    difference it is what rule `risk_diff` selects.

    Returns:
        columns `batch_idx`; `by_tokens`, `by_prompts`, `by_both`: experts selected; `jaccard`, both / either (1 where
        neither selects any).

    Raises:
        InputError: the table has no `risk_diff_prompt`.
    """
    if "risk_diff_prompt" not in risk:
        raise InputError(
            "the risk table has no column 'risk_diff_prompt'; compute it with moe_ray.identification.identify"
        )
    plain = replace(config, alpha=0.0, stability=0.0)
    if config.rule not in ("per_layer", "random"):
        plain = replace(plain, rule="risk_diff")
    settings = [replace(plain, weighting="tokens"), replace(plain, weighting="prompts")]
    rows = []
    for batch_idx, table in batch_tables(risk):
        tokens, prompts = (set(unsafe_experts(table, setting)) for setting in settings)
        either, both = len(tokens | prompts), len(tokens & prompts)
        rows.append(
            {
                "batch_idx": batch_idx,
                "by_tokens": len(tokens),
                "by_prompts": len(prompts),
                "by_both": both,
                "jaccard": both / either if either else 1.0,
            }
        )
    return pd.DataFrame(rows)
