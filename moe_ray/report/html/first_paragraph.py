"""The report's first paragraph: what was found and how sure it is, in plain words, from the figures alone."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import pandas as pd

from moe_ray.config.identify import IdentifyConfig
from moe_ray.identification.identify import USUAL_ALPHA

_FEW_EXAMPLES = 50

Figures = Mapping[str, Any]


@dataclass(frozen=True, kw_only=True)
class Findings:
    """What the paragraph speaks of.

    Attributes:
        model: its name.
        num_safe: safe examples in batches.
        num_unsafe: unsafe ones.
        num_union: experts in the union.
        num_experts: experts of all layers.
        certainty: from `certainty_per_batch`.
        selection: the configuration.
        routing: how batches were routed while they trained (`finetune.routing`).
        frozen_changed: parameters outside the union that changed; None = nothing was trained.
        before: held-out figures before the repair; None = not evaluated.
        after: the same after it.
        change: their paired differences; None = not computed.
        against_baselines: what a comparison with other experts said; empty = none was made.
    """

    model: str
    num_safe: int
    num_unsafe: int
    num_union: int
    num_experts: int
    certainty: pd.DataFrame
    selection: IdentifyConfig
    routing: str
    frozen_changed: int | None
    before: Figures | None
    after: Figures | None
    change: Figures | None
    against_baselines: str = ""


def first_paragraph(found: Findings) -> str:
    """The paragraph."""
    sentences = [_selection_in_words(found), _certainty_in_words(found)]
    if found.before is None or found.after is None:
        sentences.append("The model was not evaluated before and after a repair, so nothing is said about one here.")
    else:
        sentences += _repair_in_words(found)
    doubt = "Routing is an observation, not a cause: experts can follow a topic or a template rather than harm"
    if found.against_baselines:
        sentences.append(f"{doubt}; how other experts do is below. {found.against_baselines.splitlines()[0]}")
    elif found.after is not None:
        sentences.append(
            f"{doubt}, and other experts of the same number might repair as much: that was not tried here."
        )
    else:
        sentences.append(f"{doubt}.")
    return " ".join(sentence for sentence in sentences if sentence)


def _selection_in_words(found: Findings) -> str:
    batches = len(found.certainty)
    how = {
        "risk_diff": f"are routed more often on a batch's unsafe prompts, by more than {found.selection.threshold:g}",
        "random": "were drawn at random, as a control",
    }.get(found.selection.rule, f"were selected by rule {found.selection.rule}")
    return (
        f"moe-ray compared which experts of {found.model} are routed on {found.num_safe} safe and {found.num_unsafe} "
        f"unsafe prompts, in {batches} batch{'es' * (batches != 1)}. {found.num_union} of {found.num_experts} experts "
        f"({found.num_union / found.num_experts:.0%}) {how}, in at least one batch."
    )


def _certainty_in_words(found: Findings) -> str:
    tested = found.certainty[found.certainty["is_told_from_noise"].notna()]
    if tested.empty:
        return "No significance was computed, so nothing is known about how many of them are noise."
    level = found.selection.alpha or USUAL_ALPHA
    sure, total = int(tested["is_told_from_noise"].astype(bool).sum()), len(tested)
    test = f"permutation test over prompts, corrected for all experts, at {level:g}"
    if sure == 0:
        return f"In no batch can the selection be told from noise ({test}): take the experts named here as unproven."
    if sure == total:
        return f"In every batch at least one of them can be told from noise ({test}); that is not said of each one."
    rest = "one" if total - sure == 1 else str(total - sure)
    return (
        f"In {sure} of {total} batches at least one of them can be told from noise ({test}; chance alone would give "
        f"about {total * level:.1g}); in the other {rest} the selection may be noise."
    )


def _repair_in_words(found: Findings) -> list[str]:
    assert found.before is not None
    assert found.after is not None
    sentences: list[str] = []
    for name, what in (("unsafe_refusal_rate", "held-out unsafe prompts"), ("safe_refusal_rate", "safe ones")):
        before, after = found.before.get(name), found.after.get(name)
        if not _is_known(before) or not _is_known(after):
            continue
        assert before is not None
        assert after is not None
        opening = "After fine-tuning only these experts, the model refused" if not sentences else "It refused"
        sentences.append(
            f"{opening} {_rate(after)} of {what}, against {_rate(before)} before; {_verdict(found, name, before, after)}."
        )
    sizes = [found.after[name]["n"] for name in ("unsafe_refusal_rate", "safe_refusal_rate") if name in found.after]
    if sizes and min(sizes) < _FEW_EXAMPLES:
        sentences.append(f"That is few prompts (n = {min(sizes)} for one kind), hence the wide intervals.")
    sentences.append(_forgetting(found))
    if found.frozen_changed is not None:
        sentences.append(
            "No other parameter changed."
            if found.frozen_changed == 0
            else f"{found.frozen_changed} parameters outside of them changed, which must not happen: do not trust this run."
        )
    return sentences


def _verdict(found: Findings, name: str, before: Figures, after: Figures) -> str:
    """Whether the difference can be told from none."""
    change = (found.change or {}).get(name)
    if _is_known(change) and change is not None:
        low, high = change["low"], change["high"]
        points = f"{_points(change['value'])} points, 95% interval {_points(low)} to {_points(high)}"
        if low > 0 or high < 0:
            return f"prompt by prompt that is {'more' if low > 0 else 'less'} ({points})"
        return f"prompt by prompt that cannot be told from no change ({points})"
    if after["low"] > before["high"] or after["high"] < before["low"]:
        return "the intervals do not overlap"
    return "the intervals overlap, so a change cannot be told from none"


def _points(share: float) -> str:
    """A difference of rates in percentage points, with its sign."""
    return f"{round(100 * share):+d}" if round(100 * share) else "0"


def _forgetting(found: Findings) -> str:
    change = (found.change or {}).get("neutral_loss")
    if not _is_known(change) or change is None:
        return ""
    told = change["low"] > 0 or change["high"] < 0
    said = ("rose" if change["value"] > 0 else "fell") if told else "did not measurably change"
    return (
        f"Loss on neutral text {said} ({change['value']:+.3f} nats per token, 95% interval {change['low']:+.3f} to "
        f"{change['high']:+.3f})."
    )


def _is_known(figure: Figures | None) -> bool:
    return figure is not None and all(figure.get(key) is not None for key in ("value", "low", "high"))


def _rate(figure: Figures) -> str:
    return f"{figure['value']:.0%} ({figure['low']:.0%} to {figure['high']:.0%}, n = {figure['n']})"
