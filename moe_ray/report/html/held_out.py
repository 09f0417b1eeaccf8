"""The page's part on held-out prompts: figures before and after, overall and by category."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from moe_ray.report.html import figures
from moe_ray.report.printable import printable
from moe_ray.run_directory import RunDirectory, When, figures_of

_RATES = (("unsafe_refusal_rate", "refused, unsafe prompts"), ("safe_refusal_rate", "refused, safe prompts"))

_LOSSES = (("target_loss", "loss on target responses"), ("neutral_loss", "loss on neutral text"))


def _held_out(run: RunDirectory, when: str) -> Mapping[str, Any] | None:
    """Figures of the held-out evaluation `before` or `after`, or their paired `change`."""
    if run.summary is not None:
        found: Mapping[str, Any] | None = run.summary.get(when)
        return found
    stage: When = "before" if when == "before" else "after"
    manifest = run.manifest(figures_of(stage))
    return None if manifest is None else manifest["notes"].get("change" if when == "change" else "metrics")


def _held_out_part(drawn: dict[str, str], before: Any, after: Any, change: Any) -> list[dict[str, Any]]:
    """For every kind of routing that was evaluated, a table and charts."""
    if before is None and after is None:
        return []
    parts: list[dict[str, Any]] = []
    for name, title in (
        ("natural", "Natural routing"),
        ("masked", "Routed through each batch's mask"),
    ):
        blocks = [block and block.get("masked") if name == "masked" else block for block in (before, after, change)]
        if not any(blocks[:2]):
            continue
        rows = [_row(title, key, blocks) for key, title in (*_RATES, *_LOSSES)]
        rows = [row for row in rows if row["before"] or row["after"]]
        rates = [row for row in rows if row["is_rate"]]
        overall = f"before_after_{name}"
        drawn[overall] = figures.before_after(overall, f"Refusal rates, {title}", rates, what="refused")
        by_category = _by_category(drawn, name, blocks)
        shown = {"title": title, "rows": rows, "overall": overall, "per_category": by_category}
        parts.append({**shown, "is_first": not parts})
    return parts


def _row(title: str, key: str, blocks: Sequence[Any]) -> dict[str, Any]:
    before, after, change = ((block or {}).get(key) for block in blocks)
    return {
        "name": title,
        "before": before,
        "after": after,
        "change": change,
        "is_rate": key in dict(_RATES),
    }


def _by_category(drawn: dict[str, str], routing: str, blocks: Sequence[Any]) -> list[dict[str, Any]]:
    """Per label a chart and a table of the categories' rates."""
    known = [(block or {}).get("per_category") or {} for block in blocks]
    names = sorted(known[0].keys() | known[1].keys())
    if len(names) < 2:
        return []
    parts = []
    for key, title in _RATES:
        rows = [{**_row(name, key, [block.get(name) for block in known]), "name": printable(name)} for name in names]
        rows = [row for row in rows if any(row[when] and row[when]["n"] for when in ("before", "after"))]
        if rows:
            figure = f"{key}_{routing}_by_category"
            drawn[figure] = figures.before_after(figure, f"{title} by category", rows, what=title)
            parts.append({"title": title, "figure": figure, "rows": rows})
    return parts
