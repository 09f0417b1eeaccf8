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
    certainty: pd.DataFrame,
) -> dict[str, Any]:
    """The figures of a run, as plain values.

    Args:
        masks: of the run.
        batches: one row per example.
        num_experts_per_tok: the router's k.
        tuned: `trainable_parameters`, `total_parameters`, `frozen_parameters_changed`.
        before: metrics of the held-out evaluation before the repair.
        after: the same after it.
        certainty: from `certainty_per_batch`.
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
    """Parameters, and the held-out metrics before and after."""
    share = summary["trainable_parameters"] / summary["total_parameters"]
    rows = []
    for name in ("unsafe_refusal_rate", "safe_refusal_rate"):
        rows.append([name.replace("_", " "), _rate(summary["before"][name]), _rate(summary["after"][name])])
    losses = [summary[when]["target_loss"] for when in ("before", "after")]
    rows.append(["target loss (nats/token)", *(f"{_number(loss['value'])} (n={loss['n']})" for loss in losses)])
    table = pd.DataFrame(rows, columns=["held out, natural routing", "before", "after"])
    return (
        f"Trainable parameters: {summary['trainable_parameters']:,} of {summary['total_parameters']:,} ({share:.2%}); "
        f"frozen parameters changed: {summary['frozen_parameters_changed']}\n" + _indent(table.to_string(index=False))
    )


def describe_seconds(seconds: Mapping[str, float], reused: Sequence[str]) -> str:
    """Where the time went."""
    rows = [f"{name:<20} {value:8.1f} s{'  (reused)' if name in reused else ''}" for name, value in seconds.items()]
    return _indent("\n".join(rows))


def _rate(value: Mapping[str, Any]) -> str:
    if not value["n"]:
        return "no examples"
    return f"{value['value']:.1%} [{value['low']:.1%}, {value['high']:.1%}] (n={value['n']})"


def _number(value: float | None) -> str:
    return "none" if value is None else f"{value:.3f}"


def _indent(text: str) -> str:
    return "\n".join(f"  {line}" for line in text.splitlines())
