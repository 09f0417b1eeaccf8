"""What is left of a selection where topic or template is held fixed, in words and as a table."""

from __future__ import annotations

from collections.abc import Mapping

import pandas as pd

from moe_ray.config.identify import IdentifyConfig
from moe_ray.report.certainty_text import significance_level

Survival = Mapping[str, Mapping[str, int]]
"""Per factor, from `controls.survival`."""


def controls_in_words(survival: Survival, selection: IdentifyConfig) -> list[str]:
    """A sentence for each factor that could be controlled for.

    Args:
        survival: of the run.
        selection: the configuration.
    """
    return [_in_words(factor, counts, selection) for factor, counts in survival.items()]


def _in_words(factor: str, counts: Mapping[str, int], selection: IdentifyConfig) -> str:
    selected, above, survive = counts["selected"], counts["above"], counts["survive"]
    batches = f"{counts['batches']} batch{'es' * (counts['batches'] != 1)}"
    kept = (
        f"{above} keep a risk difference above {selection.threshold:g} when only prompts of the same {factor} are "
        "compared"
    )
    if selection.permutations:
        test = f"corrected p of at most {significance_level(selection):g}, labels shuffled within each {factor}"
        text = f"{kept}, and {survive} of these are significant ({test})"
        fewer = " Fewer prompts are compared than were selected by, so an expert that does not survive is not cleared."
    else:
        text, fewer = f"{kept}; no significance was computed", ""
    left = counts["not_controlled"]
    rest = (
        f" In {left} further batch{'es' * (left != 1)} too few prompts of both labels share a {factor}, so nothing is known "
        "there."
        if left
        else ""
    )
    return (
        f"Of {selected} selected experts in {batches} {survive} survive the control for {factor}: {text}.{fewer}{rest}"
    )


def controls_table(survival: Survival) -> pd.DataFrame:
    """A row per factor: experts selected, and those left; batches in which that could be seen, and others."""
    rows = [
        {
            "controlled for": factor,
            "selected": counts["selected"],
            "above threshold": counts["above"],
            "survive": counts["survive"],
            "share": counts["survive"] / counts["selected"],
            "batches": counts["batches"],
            "not controlled": counts["not_controlled"],
        }
        for factor, counts in survival.items()
    ]
    return pd.DataFrame(rows)
