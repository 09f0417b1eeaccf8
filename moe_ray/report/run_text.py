"""What a run says of itself in words: batches, capture, selection, outcome."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import pandas as pd

from moe_ray.config.identify import IdentifyConfig
from moe_ray.evaluation.own_answers import OwnAnswers, own_answers_in_words
from moe_ray.experts import EXPERTS_ARE_COPIES, Expert, ExpertMasks
from moe_ray.identification.risk_tables import Risk, aggregate_risk, batch_table
from moe_ray.identification.selection import difference_column, difference_name
from moe_ray.prompts.quarantine import QUARANTINE, TRUNCATED
from moe_ray.report.before_after import REFUSALS, ROUTINGS, WHENS, Block, before_after_table, blocks_of, category_rows
from moe_ray.report.format import MISSING, difference
from moe_ray.report.judge_text import judge_in_words
from moe_ray.report.neutral_text import unknown_text
from moe_ray.report.printable import printable
from moe_ray.report.truth_text import truth_in_words, truth_rows

_GLOBAL_TOP, _BATCH_TOP, _BATCHES_SHOWN, _BATCHES_NAMED = 10, 5, 3, 20
_COLUMNS = {"risk_diff": "risk difference", "a_safe_n": "safe tokens", "a_unsafe_n": "unsafe tokens"}
"""Of a risk table, and how people see them: the difference, and the shares of tokens routed to the expert."""


def describe_pair_counts(counts: Mapping[str, Any]) -> str:
    """How many pairs were kept, and why the others were dropped.

    Args:
        counts: `pairs`, `kept`, and `dropped` by reason.
    """
    dropped = ", ".join(f"{count} because {reason}" for reason, count in counts["dropped"].items())
    return f"kept {counts['kept']} of {counts['pairs']}" + (f"; dropped {dropped}" if dropped else "")


def describe_reasons(reasons: Mapping[str, int]) -> str:
    """Reasons with their counts, as `2 too_long, 1 empty`: the most frequent first, equals by name."""
    ordered = sorted(reasons.items(), key=lambda item: (-item[1], item[0]))
    return ", ".join(f"{count} {reason}" for reason, count in ordered)


def describe_capture(notes: Mapping[str, Any]) -> str:
    """What a capture counted and what it left out, and whether the model's experts differ at all.

    Args:
        notes: of its manifest.
    """
    text = f"{notes['tokens']:,} tokens of {notes['examples'] - notes['quarantined']} examples counted"
    if notes["padding_share"] is not None:
        text += f"; {notes['padding_share']:.1%} of the tokens in forward passes were padding"
    if notes["quarantined"]:
        reasons = describe_reasons(notes["reasons"])
        text += f"\n{notes['quarantined']} examples in quarantine ({reasons}), see routing/{QUARANTINE}"
    if notes["truncated"]:
        text += f"\n{notes['truncated']} examples were cut to the longest allowed length, see routing/{TRUNCATED}"
    # Manifests of runs from before these were looked at do not have them.
    if words := own_answers_in_words(notes.get("own_answers", OwnAnswers().as_dict())):
        text += f"\n{words}"
    if engine := notes.get("engine"):
        text += (
            f"\ncounted by {engine['name']} {engine['version']}; of {engine['num_choices']:,} choices in its first window "
            f"{engine['share_equal']:.2%} are those of transformers"
        )
    if notes.get("experts_are_copies"):
        text += f"\n{EXPERTS_ARE_COPIES}"
    return text


def describe_lost(batches: Sequence[int]) -> str:
    """Which batches have no mask, and why.

    Args:
        batches: their `batch_idx`; the first 20 are named.
    """
    return (
        f"{len(batches)} batches get no mask and are not trained, because no token of one of the two labels was counted "
        "(its examples are in quarantine, or have no tokens in identify.roles): "
        f"{list(batches[:_BATCHES_NAMED])}{' …' if len(batches) > _BATCHES_NAMED else ''}"
    )


def describe_batches(batches: pd.DataFrame, num_test: int, num_left_over: int) -> str:
    """How many examples and batches there are, and of what.

    Args:
        batches: rows with `batch_idx`, `label` and `category`, one per example.
        num_test: held-out examples.
        num_left_over: examples that were too few to fill another batch.
    """
    per_category = batches.groupby("category", sort=True)["batch_idx"].nunique()
    names = ", ".join(f"{printable(str(name)) or 'uncategorised'} {count}" for name, count in per_category.items())
    labels = batches["label"].value_counts()
    return (
        f"{len(batches)} examples ({labels['safe']} safe, {labels['unsafe']} unsafe) in "
        f"{batches['batch_idx'].nunique()} batches; {num_test} held out; {num_left_over} left over (too few for a batch)\n"
        f"batches per category: {names}"
    )


def describe_selection(
    risk: Risk, masks: ExpertMasks, num_experts_per_tok: int, selection: IdentifyConfig | None = None
) -> str:
    """Global and per-batch unsafe experts, and how many there are.

    Args:
        risk: from `identify`.
        masks: selected from it.
        num_experts_per_tok: the router's k.
        selection: the settings of the selection; None = the defaults.
    """
    chosen_by = selection or IdentifyConfig()
    column, what = difference_column(chosen_by), difference_name(chosen_by)
    overall = aggregate_risk(risk).sort_values([column, "layer", "expert"], ascending=[False, True, True])
    sizes = pd.Series({batch: len(masks.selected[batch]) for batch in masks.batch_idx})
    parts = [
        f"The {_GLOBAL_TOP} experts with the largest {what}, mean over {len(sizes)} batches:",
        expert_table(overall.head(_GLOBAL_TOP), column, what),
    ]
    for batch in masks.batch_idx[:_BATCHES_SHOWN]:
        chosen = masks.selected[batch]
        by_expert = batch_table(risk, batch).set_index(["layer", "expert"])
        shown = f", of which the first {_BATCH_TOP}:" if len(chosen) > _BATCH_TOP else ":" if chosen else ""
        parts.append(f"Batch {batch}: {len(chosen)} unsafe experts{shown}")
        if chosen:
            parts.append(expert_table(by_expert.loc[list(chosen[:_BATCH_TOP])].reset_index(), column, what))
    _, num_layers, num_experts = masks.masks_BLE.shape
    sizes_BL = masks.masks_BLE.sum(axis=2)
    empty = (sizes_BL == 0).sum(axis=1)
    short = ((sizes_BL > 0) & (sizes_BL < num_experts_per_tok)).sum(axis=1)
    parts.append(
        f"Unsafe experts per batch: {sizes.min()} to {sizes.max()}, mean {sizes.mean():.1f}; "
        f"union {len(masks.union_experts)} of {num_layers * num_experts} experts"
    )
    parts.append(
        f"Layers per batch without unsafe experts, where routing stays free: {empty.min()} to {empty.max()}; with some, but "
        f"fewer than the {num_experts_per_tok} that the router picks per token: {short.min()} to {short.max()}"
    )
    untrained = sorted(set(masks.batch_idx) - set(masks.trained_batches))
    if untrained:
        parts.append(f"Batches without any unsafe expert, which are not trained: {untrained}")
    return "\n".join(parts)


def expert_table(table: pd.DataFrame, column: str = "risk_diff", what: str = "risk difference") -> str:
    """Experts by name, with what they are ranked by, their risk difference and the shares of tokens, as aligned text.

    Args:
        table: rows with `layer, expert, risk_diff, a_safe_n, a_unsafe_n` and the column.
        column: that they are ranked by.
        what: it is, in words.
    """
    columns = {column: what, **_COLUMNS}
    names = [str(Expert(layer, expert)) for layer, expert in zip(table["layer"], table["expert"], strict=True)]
    shown = pd.DataFrame({"expert": names} | {title: table[name].to_numpy() for name, title in columns.items()})
    return _indent(shown.to_string(index=False, float_format=lambda value: f"{value:.4f}"))


def describe_outcome(summary: Mapping[str, Any]) -> str:
    """Parameters, and what is said of the held-out figures, which `outcome_tables` holds.

    Args:
        summary: from `build_summary`.
    """
    share = summary["trainable_parameters"] / summary["total_parameters"]
    parts = [
        f"Trainable parameters: {summary['trainable_parameters']:,} of {summary['total_parameters']:,} ({share:.2%}); "
        f"frozen parameters changed: {summary['frozen_parameters_changed']}"
    ]
    if summary["pairs"] is not None:
        parts.append(f"Pairs: {describe_pair_counts(summary['pairs'])}")
    parts += truth_in_words(summary.get("truth"))
    parts += judge_in_words(summary.get("judge"))
    parts += unknown_text(summary["before"], summary.get("uniform_loss"))
    drift = summary["after"]["routing_drift"]
    if drift is not None:
        parts.append(_drift_in_words(drift))
    return "\n".join(parts)


def outcome_tables(summary: Mapping[str, Any]) -> list[tuple[str, pd.DataFrame]]:
    """The held-out figures before, after, and their change, overall and per category, and what was known beforehand.

    Titles, and rows of text.

    Args:
        summary: from `build_summary`.
    """
    whens = [summary.get(when) for when in WHENS]
    title = "Before and after (held out, 95% intervals, the change paired by example)"
    tables = [(title, before_after_table(whens))]
    for routing, name in ROUTINGS.items():
        table = _category_table(blocks_of(whens, routing))
        if not table.empty:
            tables.append((f"{name}, by category (before → after)", table))
    if summary.get("truth") is not None:
        tables.append(("Found, where it is known", truth_rows(summary["truth"])))
    return tables


def _drift_in_words(drift: Mapping[str, Any]) -> str:
    # Activation rates are shares of tokens, so their changes are points, as are those of refusal rates.
    mean, largest = (difference(drift[name], "points") for name in ("mean_absolute_change", "largest_change"))
    expert = Expert(drift["layer"], drift["expert"])
    return (
        f"Routing drift (change of an expert's share of tokens): mean absolute {mean}; largest {largest}, of {expert}"
    )


def _category_table(blocks: Sequence[Block]) -> pd.DataFrame:
    """Categories with refusals of unsafe and safe prompts; empty where all examples are of one category."""
    columns: dict[str, dict[str, str]] = {}
    for key, title in REFUSALS.items():
        rows = category_rows(blocks, key)
        columns[title] = {row.name: f"{row.cells[0].value} → {row.cells[1].value} (n = {row.n})" for row in rows}
        columns[f"change, {key.partition('_')[0]}"] = {row.name: str(row.cells[2]) for row in rows}
    names = sorted({name for column in columns.values() for name in column})
    shown = {title: [column.get(name, MISSING) for name in names] for title, column in columns.items()}
    return pd.DataFrame({"category": [printable(name) for name in names], **shown})


def _indent(text: str) -> str:
    return "\n".join(f"  {line}" for line in text.splitlines())
