"""Whether the selected experts are what makes the difference: the rule, and the sentence.

causal      p_prompts and p_sets are at most alpha, and both the selection's specific effect and its lift over matched sets
            are above `ablate.min_effect`, the lower ends of their 95% intervals included
not         the upper end of either interval is below `ablate.min_effect`
undecided   all else

A size is asked for beside a p because with enough prompts any difference is significant: a model whose behaviour is spread
over all experts shows 0.02 to 0.16 nats at p down to 0.0001, and answers as before.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, Literal

import pandas as pd

from moe_ray.ablation.expert_sets import BUSIEST, GLOBAL, MATCHED, OTHER, SELECTED
from moe_ray.config.ablate import AblateConfig
from moe_ray.models.expert_copies import EXPERTS_ARE_COPIES

Word = Literal["causal", "not", "undecided", "nothing", "copies"]

SAID: Mapping[Word, str] = {
    "causal": "causal",
    "not": "routing differs, but these experts are not what makes the difference",
    "undecided": "undecided: this cannot be told apart from chance with so many batches, prompts and draws",
    "nothing": "nothing to take away: the model itself refuses what it was asked",
    "copies": "all experts of a layer are equal",
}
"""What a verdict says."""

_SAME_SHARE = 0.05
"""Of all tokens: a difference up to this is called none."""

_NAMES = {BUSIEST: "the busiest experts", OTHER: "another category's list", GLOBAL: "one global list"}


def overall(table: pd.DataFrame, config: AblateConfig) -> Word:
    """The verdict over all batches.

    Args:
        table: from `effect_table`.
        config: `alpha` and `min_effect`.
    """
    if table.empty:
        return "nothing"
    own, matched = _row(table, SELECTED), _row(table, MATCHED)
    if own is None or matched is None:
        return "undecided"
    if own["specific_high"] < config.min_effect or matched["lift_high"] < config.min_effect:
        return "not"
    is_large = own["specific_low"] > config.min_effect and matched["lift_low"] > config.min_effect
    is_certain = max(own["p_prompts"], matched["p_sets"]) <= config.alpha
    return "causal" if is_large and is_certain else "undecided"


def of_batch(row: Mapping[str, Any], config: AblateConfig) -> Word:
    """The verdict of one batch, which has no batches to compare: its p is corrected for their number.

    Causal: effect and lift are at least `min_effect`, larger than those of every matched set, at `p_holm` of at most alpha.

    Args:
        row: of `batch_table`.
        config: `alpha` and `min_effect`.
    """
    if not min(row["n_unsafe"], row["n_safe"]):
        return "nothing"
    if math.isnan(row["p_prompts"]):
        return "undecided"
    if min(row["specific"], row["lift"]) < config.min_effect:
        # No interval: a batch says what it saw, and not that there is nothing.
        return "not" if row["p_prompts"] > config.alpha or row["specific"] < config.min_effect else "undecided"
    return "causal" if row["p_holm"] <= config.alpha and row["beats_every_draw"] else "undecided"


def in_words(word: Word, table: pd.DataFrame, batches: pd.DataFrame) -> str:
    """The verdict over all batches as a sentence with its numbers.

    Args:
        word: from `overall`, or `copies`.
        table: from `effect_table`.
        batches: from `batch_table`.
    """
    if word == "copies":
        return f"{EXPERTS_ARE_COPIES}."
    own, matched = _row(table, SELECTED), _row(table, MATCHED)
    if own is None or matched is None:
        refused = int(batches["refused"].sum())
        return f"{_upper(SAID['nothing'])} ({refused} unsafe prompts of {len(batches)} batches)."
    lift = _with_interval(matched, "lift")
    head = (
        f"Without a batch's selected experts the model's answers to unsafe prompts lose {_nats(own['unsafe'])} nats a token "
        f"and to safe ones {_nats(own['safe'])}; without {_others(own, matched)} {_nats(matched['unsafe'])} and "
        f"{_nats(matched['safe'])} ({lift}; p = {max(own['p_prompts'], matched['p_sets']):.2g}; "
        f"{int(own['batches'])} batches): {SAID[word]}"
    )
    if word != "causal":
        return f"{head}."
    better: list[str] = []
    not_better: list[str] = []
    for name in (OTHER, GLOBAL, BUSIEST):
        row = _row(table, name)
        if row is not None:
            is_better = row["lift_low"] > 0
            (better if is_better else not_better).append(f"{_NAMES[name]} ({_with_interval(row, 'lift')})")
    parts = [f"better than {_and(better)}"] if better else []
    parts += [f"not shown to be better than {_and(not_better)}"] if not_better else []
    return "; ".join([head, *parts]) + "."


def batch_in_words(row: Mapping[str, Any], word: Word) -> str:
    """The verdict of a batch as a sentence.

    Args:
        row: of `batch_table`.
        word: from `of_batch`.
    """
    name = f"Batch {int(row['batch_idx'])} ({row['category']})"
    if word == "nothing":
        return f"{name}: {SAID[word]} ({int(row['refused'])} unsafe prompts)."
    said = "undecided" if word == "undecided" else SAID[word]
    return (
        f"{name}: without its {int(row['experts'])} experts answers to unsafe prompts lose {_nats(row['unsafe'])} nats a "
        f"token, to safe ones {_nats(row['safe'])}; without as many others {_nats(row['matched_unsafe'])} and "
        f"{_nats(row['matched_safe'])}: {said}."
    )


def refusals_in_words(answers: pd.DataFrame) -> str:
    """What the model says without the selection: shares of refusals by wording; empty where it was not asked.

    Args:
        answers: from `measure_batch`, of all batches.
    """
    if "refused_without" not in answers:
        return ""
    scored = answers[answers["refused_without"].notna()]
    of_label = {label: rows for label, rows in scored.groupby("label")}
    if "unsafe" not in of_label:
        return ""
    rate, num = of_label["unsafe"]["refused_without"].astype(bool).mean(), len(of_label["unsafe"])
    text = f"Without them {rate:.0%} of {num} unsafe prompts that the model answers are refused"
    if "safe" in of_label:
        safe = of_label["safe"]
        before = (safe["state"] == "refused").mean()
        text += (
            f", and {safe['refused_without'].astype(bool).mean():.0%} of {len(safe)} safe ones ({before:.0%} with them)"
        )
    return f"{text}, by the wording of the answers."


def _row(table: pd.DataFrame, name: str) -> Mapping[str, Any] | None:
    found = table[table["set"] == name] if len(table) else table
    return None if found.empty else {str(key): value for key, value in found.iloc[0].items()}


def _others(own: Mapping[str, Any], matched: Mapping[str, Any]) -> str:
    """What the controls are; where no other experts have as many tokens, how many these have."""
    if abs(own["share"] - matched["share"]) <= _SAME_SHARE:
        return "other experts of the same share"
    return f"as many other experts, which have {matched['share']:.0%} of the tokens and not {own['share']:.0%},"


def _with_interval(row: Mapping[str, Any], name: str) -> str:
    return f"{row[name]:+.2f} [{row[f'{name}_low']:.2f}, {row[f'{name}_high']:.2f}]"


def _nats(value: float) -> str:
    """Two decimals; what rounds to zero has no sign."""
    return f"{round(float(value), 2) + 0.0:.2f}"


def _and(names: list[str]) -> str:
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"


def _upper(text: str) -> str:
    return text[:1].upper() + text[1:]
