"""What the causal check found, in words and as table rows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import pandas as pd

from moe_ray.ablation.expert_sets import BUSIEST, FORCED, FORCED_MATCHED, GLOBAL, MATCHED, OTHER, SELECTED
from moe_ray.report.format import MISSING, decimal, significant_digits
from moe_ray.report.printable import printable, printable_lines
from moe_ray.run_directory import ABLATE, ABLATION_BATCHES

_NAMES = {
    SELECTED: "the selected experts",
    MATCHED: "as many others",
    BUSIEST: "the busiest",
    OTHER: "another category's",
    GLOBAL: "one global list",
    FORCED: "all but the selected",
    FORCED_MATCHED: "all but as many others",
}
_MOST_BATCHES = 20
_DIGITS = 2


def set_name(name: str) -> str:
    """What a set is called where people read: `without` this."""
    kind, _, size = name.partition(" ")
    return f"the strongest {size}" if size else _NAMES.get(kind, name)


def ablation_rows(notes: Mapping[str, Any]) -> pd.DataFrame:
    """A row of text per kind of set.

    Args:
        notes: of the stage's manifest, or `summary["ablate"]`.
    """
    return pd.DataFrame(
        [
            {
                "without": set_name(row["set"]),
                "unsafe": decimal(row["unsafe"], _DIGITS),
                "safe": decimal(row["safe"], _DIGITS),
                "unsafe − safe": _with_interval(row, "specific"),
                "selected − this": _with_interval(row, "lift"),
                "p": _p(row),
                "experts": decimal(row["experts"], 1),
                "share of tokens": f"{row['share']:.0%}",
                "batches": str(row["batches"]),
            }
            for row in notes["table"]
        ]
    )


def batch_rows(notes: Mapping[str, Any]) -> list[dict[str, str]]:
    """A row of text per batch: its category, what its prompts lose, and its verdict."""
    return [
        {
            "batch_idx": batch,
            "category": printable(str(row["category"])),
            "experts": decimal(row["experts"], 0),
            "unsafe": decimal(row["unsafe"], _DIGITS),
            "safe": decimal(row["safe"], _DIGITS),
            "matched": decimal(row["matched_specific"], _DIGITS),
            "lift": decimal(row["lift"], _DIGITS, signed=True),
            "p": significant_digits(row["p_holm"]),
            "n": f"{row['n_unsafe']} + {row['n_safe']}",
            "refused": str(row["refused"]),
            "verdict": row["verdict"],
        }
        for batch, row in notes["per_batch"].items()
    ]


def category_rows(notes: Mapping[str, Any]) -> list[dict[str, str]]:
    """A row of text per category: means over its batches that were scored, and how many of them are causal."""
    batches = pd.DataFrame.from_records(list(notes["per_batch"].values()))
    if batches.empty:
        return []
    rows = []
    for name, of_category in batches.groupby("category"):
        scored = of_category[of_category["specific"].notna()].astype({"specific": float, "lift": float})
        rows.append(
            {
                "category": printable(str(name)),
                "batches": str(len(of_category)),
                "causal": str(int((of_category["verdict"] == "causal").sum())),
                "specific": decimal(scored["specific"].mean(), _DIGITS),
                "lift": decimal(scored["lift"].mean(), _DIGITS, signed=True),
            }
        )
    return rows


def describe_ablation(notes: Mapping[str, Any]) -> str:
    """The verdict, sentences of the first batches, and what the check cost.

    Args:
        notes: of the stage's manifest.
    """
    sentences = [str(row["in_words"]) for row in notes["per_batch"].values()]
    left_out = len(sentences) - _MOST_BATCHES
    more = [f"… and {left_out} more batches in {ABLATE}/{ABLATION_BATCHES}"] if left_out > 0 else []
    cost = f"{notes['forwards']:,} forward passes of {notes['tokens']:,} tokens"
    return printable_lines("\n".join([str(notes["in_words"]), *sentences[:_MOST_BATCHES], *more, cost]))


def alone_by_expert(experts: pd.DataFrame | None) -> Mapping[str, float]:
    """The mean over batches of what each expert's absence alone takes from unsafe answers more than from safe ones.

    Args:
        experts: of `ablate/experts.csv`; None = none was taken away alone.
    """
    if experts is None or experts.empty:
        return {}
    return {str(name): float(rows.mean()) for name, rows in experts.groupby("expert")["alone"]}


def alone_of(names: Sequence[str], experts: pd.DataFrame | None) -> list[str]:
    """That of experts by name, as text in nats per token; a dash for those that were not taken away alone."""
    alone = alone_by_expert(experts)
    return [decimal(alone[name], _DIGITS, signed=True) if name in alone else MISSING for name in names]


def _with_interval(row: Mapping[str, Any], name: str) -> str:
    value, low, high = (row.get(key) for key in (name, f"{name}_low", f"{name}_high"))
    if value is None:
        return MISSING if name == "specific" else ""
    interval = "" if low is None else f" [{decimal(low, _DIGITS)}, {decimal(high, _DIGITS)}]"
    return decimal(value, _DIGITS, signed=True) + interval


def _p(row: Mapping[str, Any]) -> str:
    known = [row[name] for name in ("p_prompts", "p_sets") if row.get(name) is not None]
    return significant_digits(max(known)) if known else ""
