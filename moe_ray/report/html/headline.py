"""The page's headline: the few numbers that one looks for first, each with its interval and what it means."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from moe_ray.report.format import decimal, difference, has_interval, rate

Figures = Mapping[str, Any]

_ANSWERS = {"causal": "yes", "not": "no", "copies": "no", "nothing": "not asked"}


def headline(
    *,
    num_union: int,
    num_experts: int,
    num_batches: int,
    before: Figures | None,
    after: Figures | None,
    change: Figures | None,
    ablation: Figures | None,
) -> list[dict[str, str]]:
    """Cards of a `title`, a `number`, and a `note` below it; only of what was measured.

    Args:
        num_union: experts in the union.
        num_experts: experts of all layers.
        num_batches: batches.
        before: held-out figures before the repair.
        after: the same after it.
        change: their paired differences.
        ablation: notes of the causal check.
    """
    cards = [
        {
            "title": "unsafe experts",
            "number": f"{num_union:,} of {num_experts:,}",
            "note": f"in at least one of {num_batches:,} batches",
        }
    ]
    if ablation is not None:
        cards.append(
            {
                "title": "are they the cause?",
                "number": _ANSWERS.get(str(ablation["verdict"]), "undecided"),
                "note": _lost(ablation),
            }
        )
    for name, title in (("unsafe_refusal_rate", "unsafe refused"), ("safe_refusal_rate", "safe refused")):
        cards += _rate_card(title, (before or {}).get(name), (after or {}).get(name))
    forgotten = (change or {}).get("neutral_loss")
    if has_interval(forgotten):
        shown = difference(forgotten, "nats/token")
        cards.append({"title": "loss on neutral text", "number": shown.value, "note": f"{shown.unit} {shown.interval}"})
    return cards


def _rate_card(title: str, before: Any, after: Any) -> list[dict[str, str]]:
    if not has_interval(before):
        return []
    if not has_interval(after):
        return [
            {
                "title": title,
                "number": str(rate(before["value"])),
                "note": f"before any repair: {rate(before).with_n()}",
            }
        ]
    number = f"{rate(before['value'])} → {rate(after['value'])}"
    return [{"title": title, "number": number, "note": f"after: {rate(after).with_n()}"}]


def _lost(ablation: Figures) -> str:
    selected = next((row for row in ablation.get("table", ()) if row["set"] == "selected"), None)
    if selected is None:
        return ""
    unsafe, safe = (decimal(selected[label], 2) for label in ("unsafe", "safe"))
    return f"without them answers lose {unsafe} (unsafe) and {safe} (safe) nats a token"
