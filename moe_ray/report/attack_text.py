"""What attacks did, as table rows and in words."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pandas as pd

from moe_ray.attacks.names import NO_ATTACK, TITLES
from moe_ray.report.format import MISSING, decimal, difference, is_measured, is_significant, rate
from moe_ray.report.printable import printable

_ABOUT = {
    "affirmation": "an affirmative first token became likelier by {} nats on average",
    "silenced": "{:.0f} experts were silenced",
    "layer": "the direction was found before layer {:.0f}",
    "first_loss": "loss of the first step {}",
    "last_loss": "of the last {} nats/token",
}


def attack_rows(notes: Mapping[str, Any]) -> pd.DataFrame:
    """A row of text per attack; differences are in points.

    Args:
        notes: of the stage's manifest, or `summary["attack"]`.
    """
    return pd.DataFrame(
        [
            {
                "attack": TITLES.get(name, printable(name)),
                "unsafe refused, before": str(rate(found["unsafe_before"])),
                "after": str(rate(found["unsafe_after"])),
                "change by the repair": _points(found["unsafe_change"]),
                "change by the attack": _points(found.get("unsafe_lost")),
                "safe refused, after": str(rate(found["safe_after"])),
                "n": str((found["unsafe_after"] or {}).get("n", 0)),
            }
            for name, found in notes["figures"].items()
        ]
    )


def _points(figure: Mapping[str, Any] | None) -> str:
    return str(difference(figure, "points").without_unit()) if is_measured(figure) else MISSING


def describe_attacks(notes: Mapping[str, Any]) -> str:
    """Which attacks undo the repair, by how much, and what was not asked; a sentence a line."""
    figures = {name: found for name, found in notes["figures"].items() if name != NO_ATTACK}
    plain = notes["figures"][NO_ATTACK]["unsafe_after"]
    lost = {name: found["unsafe_lost"] for name, found in figures.items() if is_significant(found.get("unsafe_lost"))}
    undoing = sorted((name for name in lost if lost[name]["value"] < 0), key=lambda name: lost[name]["value"])
    lines = [f"Without an attack the repaired model refuses {rate(plain).with_n()} of unsafe prompts."]
    if undoing:
        named = ", ".join(f"{TITLES[name]} ({difference(lost[name], 'points').without_unit()})" for name in undoing)
        lines.append(f"{len(undoing)} of {len(figures)} attacks make it refuse fewer, in points: {named}.")
    else:
        lines.append(f"None of {len(figures)} attacks is seen to make it refuse fewer.")
    lines.append(
        "An answer that does not refuse need not be harmful: under a cipher that a model cannot read it is often noise."
    )
    for name, about in notes["about"].items():
        said = _about(about)
        lines += [f"{TITLES[name]}, on the repaired model: {said}."] if said else []
    lines += [
        f"{TITLES[name]}: {number} prompts could not be asked, being too long for the model."
        for name, number in notes["left_out"].items()
    ]
    return "\n".join(lines)


def _about(about: Mapping[str, float]) -> str:
    known = [
        text.format(about[f"after_{key}"] if ":" in text else decimal(about[f"after_{key}"], 2))
        for key, text in _ABOUT.items()
        if f"after_{key}" in about
    ]
    return ", ".join(known)
