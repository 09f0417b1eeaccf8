"""What a run says in the terminal: batches, capture, selection, outcome."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import pandas as pd

from moe_ray.experts import Expert, ExpertMasks
from moe_ray.identification.risk import aggregate_risk
from moe_ray.prompts.quarantine import QUARANTINE, TRUNCATED
from moe_ray.report.printable import printable


def describe_pair_counts(counts: Mapping[str, Any]) -> str:
    """The counts in words."""
    dropped = ", ".join(f"{count} because {reason}" for reason, count in counts["dropped"].items())
    return f"kept {counts['kept']} of {counts['pairs']}" + (f"; dropped {dropped}" if dropped else "")


def describe_reasons(reasons: Mapping[str, int]) -> str:
    """`2 too_long, 1 empty`, the most frequent first."""
    ordered = sorted(reasons.items(), key=lambda item: (-item[1], item[0]))
    return ", ".join(f"{count} {reason}" for reason, count in ordered)


def describe_capture(notes: Mapping[str, Any]) -> str:
    """What a capture counted and what it left out, in words."""
    text = f"{notes['tokens']:,} tokens of {notes['examples'] - notes['quarantined']} examples counted"
    if notes["padding_share"] is not None:
        text += f"; {notes['padding_share']:.1%} of the tokens in forward passes were padding"
    if notes["quarantined"]:
        reasons = describe_reasons(notes["reasons"])
        text += f"\n{notes['quarantined']} examples in quarantine ({reasons}), see routing/{QUARANTINE}"
    if notes["truncated"]:
        text += f"\n{notes['truncated']} examples were cut to the longest allowed length, see routing/{TRUNCATED}"
    return text


def describe_lost(batches: Sequence[int]) -> str:
    """Which batches have no mask, and why."""
    return (
        f"{len(batches)} batches have no counted tokens of one label, because its examples are in quarantine or have no "
        f"tokens in identify.roles; they get no mask and are not trained: {list(batches[:20])}"
    )


_GLOBAL_TOP, _BATCH_TOP, _BATCHES_SHOWN = 10, 5, 3

_NUMBERS = ("risk_diff", "a_safe_n", "a_unsafe_n")


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
