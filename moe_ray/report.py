"""What a researcher wants to see of a run: the summary as plain values, and as text.

Shape suffixes: L MoE layers, E experts.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

import pandas as pd

from moe_ray.config import SelectionConfig
from moe_ray.confounds import confound_warnings, weighting_agreement
from moe_ray.export import prompt_text
from moe_ray.identification import certainty_in_words, certainty_per_batch
from moe_ray.moe_layers import Expert
from moe_ray.pairs import describe_pair_counts
from moe_ray.risk import aggregate_risk
from moe_ray.routing import RoutingCounts
from moe_ray.selection import ExpertMasks

_GLOBAL_TOP, _BATCH_TOP, _BATCHES_SHOWN = 10, 5, 3
_NUMBERS = ("risk_diff", "a_safe_n", "a_unsafe_n")


def printable(text: str) -> str:
    """Untrusted text without control characters, so that it cannot steer a terminal."""
    return "".join(character if character.isprintable() else "\N{REPLACEMENT CHARACTER}" for character in text)


def build_summary(
    *,
    masks: ExpertMasks,
    batches: pd.DataFrame,
    num_experts_per_tok: int,
    tuned: Mapping[str, Any],
    before: Mapping[str, Any],
    after: Mapping[str, Any],
    change: Mapping[str, Any],
    certainty: pd.DataFrame,
    pairs: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """The figures of a run, as plain values.

    Args:
        masks: of the run.
        batches: one row per example.
        num_experts_per_tok: the router's k.
        tuned: `trainable_parameters`, `total_parameters`, `frozen_parameters_changed`.
        before: metrics of the held-out evaluation before the repair.
        after: the same after it.
        change: after minus before, from `compare`.
        certainty: from `certainty_per_batch`.
        pairs: how many pairs were kept and dropped; None = no filter.
    """
    _, num_layers, num_experts = masks.masks_BLE.shape
    return {
        "batches": len(masks.batch_idx),
        "examples": len(batches),
        "num_layers": num_layers,
        "num_experts": num_experts,
        "num_experts_per_tok": num_experts_per_tok,
        "union_experts": len(masks.union_experts),
        "trainable_parameters": tuned["trainable_parameters"],
        "total_parameters": tuned["total_parameters"],
        "per_batch_unsafe_experts": {
            str(batch): [str(expert) for expert in masks.selected[batch]] for batch in masks.batch_idx
        },
        "empty_layers_per_batch": {str(batch): list(masks.empty_layers(batch)) for batch in masks.batch_idx},
        "short_layers_per_batch": {
            str(batch): list(masks.short_layers(batch, num_experts_per_tok)) for batch in masks.batch_idx
        },
        "untrained_batches": sorted(set(masks.batch_idx) - set(masks.trained_batches)),
        "batches_not_told_from_noise": certainty.loc[certainty["is_told_from_noise"].eq(False), "batch_idx"].tolist(),
        "before": dict(before),
        "after": dict(after),
        "change": dict(change),
        "pairs": None if pairs is None else dict(pairs),
        "frozen_parameters_changed": tuned["frozen_parameters_changed"],
    }


def describe_batches(batches: pd.DataFrame, num_test: int, num_left_over: int) -> str:
    """How many examples and batches there are, and of what."""
    per_category = batches.groupby("category", sort=True)["batch_idx"].nunique()
    names = ", ".join(f"{printable(str(name)) or 'uncategorised'} {count}" for name, count in per_category.items())
    labels = batches["label"].value_counts()
    return (
        f"{len(batches)} examples ({labels['safe']} safe, {labels['unsafe']} unsafe) in "
        f"{batches['batch_idx'].nunique()} batches; {num_test} held out; {num_left_over} filled no batch\n"
        f"batches per category: {names}"
    )


def describe_selection(risk: pd.DataFrame, masks: ExpertMasks, num_experts_per_tok: int) -> str:
    """Global and per-batch unsafe experts, and how many there are."""
    sizes = pd.Series({batch: len(masks.selected[batch]) for batch in masks.batch_idx})
    parts = [
        f"Global top {_GLOBAL_TOP} experts, mean over {len(sizes)} batches:",
        expert_table(aggregate_risk(risk).head(_GLOBAL_TOP)),
    ]
    for batch in masks.batch_idx[:_BATCHES_SHOWN]:
        chosen = masks.selected[batch]
        own = risk[risk["batch_idx"] == batch].set_index(["layer", "expert"])
        parts.append(f"Batch {batch}: {len(chosen)} unsafe experts, the top {min(_BATCH_TOP, len(chosen))}:")
        if chosen:
            parts.append(expert_table(own.loc[list(chosen[:_BATCH_TOP])].reset_index()))
    _, num_layers, num_experts = masks.masks_BLE.shape
    empty = [len(masks.empty_layers(batch)) for batch in masks.batch_idx]
    short = [len(masks.short_layers(batch, num_experts_per_tok)) for batch in masks.batch_idx]
    parts.append(
        f"Unsafe experts per batch: min {sizes.min()}, max {sizes.max()}, mean {sizes.mean():.1f}; "
        f"union {len(masks.union_experts)} of {num_layers * num_experts} experts"
    )
    parts.append(
        f"Layers per batch that route naturally (empty): {min(empty)} to {max(empty)}; "
        f"with fewer unsafe experts than a token uses (short): {min(short)} to {max(short)}"
    )
    untrained = sorted(set(masks.batch_idx) - set(masks.trained_batches))
    if untrained:
        parts.append(f"Batches without any unsafe expert, which are not trained: {untrained}")
    return "\n".join(parts)


def expert_table(table: pd.DataFrame) -> str:
    """Rows with `layer, expert, risk_diff, a_safe_n, a_unsafe_n` as aligned text, experts by name."""
    names = [str(Expert(layer, expert)) for layer, expert in zip(table["layer"], table["expert"], strict=True)]
    shown = pd.DataFrame({"expert": names} | {name: table[name].to_numpy() for name in _NUMBERS})
    return _indent(shown.to_string(index=False, float_format=lambda value: f"{value:.4f}"))


def describe_certainty(
    counts: RoutingCounts, risk: pd.DataFrame, masks: ExpertMasks, batches: pd.DataFrame, selection: SelectionConfig
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


def describe_outcome(summary: Mapping[str, Any]) -> str:
    """Parameters, and the held-out figures before, after, and how much they changed, overall and per category."""
    share = summary["trainable_parameters"] / summary["total_parameters"]
    parts = [
        f"Trainable parameters: {summary['trainable_parameters']:,} of {summary['total_parameters']:,} ({share:.2%}); "
        f"frozen parameters changed: {summary['frozen_parameters_changed']}"
    ]
    if summary["pairs"] is not None:
        parts.append(f"Pairs: {describe_pair_counts(summary['pairs'])}")
    whens = [summary[name] for name in ("before", "after", "change")]
    parts.append("Held out, with 95% intervals; change is paired, in points of a percent or nats per token")
    parts.append(_indent(_outcome_table(whens)))
    for routing, blocks in (("natural", whens), ("masked", [when["masked"] for when in whens])):
        if blocks[0] is not None and len(blocks[0]["per_category"]) > 1:
            parts.append(f"By category, {routing} routing (refused before → after of n)")
            parts.append(_indent(_category_table(blocks)))
    return "\n".join(parts)


def _outcome_table(whens: Sequence[Mapping[str, Any]]) -> str:
    rows = []
    for routing, blocks in (("natural", whens), ("masked", [when["masked"] for when in whens])):
        if blocks[0] is None or not _num(blocks[0]):
            continue
        for label in ("unsafe", "safe"):
            before, after, change = (block[f"{label}_refusal_rate"] for block in blocks)
            rows.append([f"{label} refused, {routing}", _rate(before), _rate(after), _points(change)])
        rows.append([f"target loss, {routing}", *(_with_interval(block["target_loss"]) for block in blocks)])
    if whens[0]["neutral_loss"] is not None:
        rows.append(["neutral text loss", *(_with_interval(when["neutral_loss"]) for when in whens)])
    drift = whens[1]["routing_drift"]
    text = pd.DataFrame(rows, columns=["", "before", "after", "change"]).to_string(index=False)
    if drift is None:
        return text
    mean, largest = (_with_interval(drift[name]) for name in ("mean_absolute_change", "largest_change"))
    moved = (
        f"activation rates moved by {mean} on average, at most by {largest} ({Expert(drift['layer'], drift['expert'])})"
    )
    return f"{text}\nrouting drift: {moved}"


def _num(block: Mapping[str, Any]) -> int:
    return int(block["unsafe_refusal_rate"]["n"] + block["safe_refusal_rate"]["n"])


def _category_table(blocks: Sequence[Mapping[str, Any]]) -> str:
    rows = []
    for category in blocks[0]["per_category"]:
        before, after, change = (block["per_category"][category] for block in blocks)
        row = [printable(category)]
        for label in ("unsafe", "safe"):
            name = f"{label}_refusal_rate"
            row += [_arrow(before[name], after[name]), _points(change[name])]
        rows.append(row)
    return pd.DataFrame(rows, columns=["", "unsafe", "change", "safe", "change "]).to_string(index=False)


def _arrow(before: Mapping[str, Any], after: Mapping[str, Any]) -> str:
    if not before["n"]:
        return "no examples"
    return f"{before['value']:.0%} → {after['value']:.0%} of {before['n']}"


def _points(change: Mapping[str, Any]) -> str:
    if not change["n"]:
        return ""
    return f"{100 * change['value']:+.1f} [{100 * change['low']:+.1f}, {100 * change['high']:+.1f}]"


def _with_interval(figure: Mapping[str, Any]) -> str:
    if figure["value"] is None:
        return "none"
    interval = "" if figure["low"] is None else f" [{figure['low']:.3f}, {figure['high']:.3f}]"
    return f"{figure['value']:.3f}{interval} (n={figure['n']})"


def _rate(value: Mapping[str, Any]) -> str:
    if not value["n"]:
        return "no examples"
    return f"{value['value']:.1%} [{value['low']:.1%}, {value['high']:.1%}] (n={value['n']})"


def _indent(text: str) -> str:
    return "\n".join(f"  {line}" for line in text.splitlines())
