"""The report's first paragraph: what was found and how sure it is, in plain words, from the figures alone."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import pandas as pd

from moe_ray.config.identify import IdentifyConfig
from moe_ray.experts import EXPERTS_ARE_COPIES
from moe_ray.report.certainty_text import known_significance, significance_level
from moe_ray.report.format import difference, has_interval, is_significant, rate
from moe_ray.report.neutral_text import unknown_text

_FEW_EXAMPLES = 50
"""Below this number, the 95% interval of a rate around a half is more than 26 points wide."""

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
        frozen_changed: parameters outside the union that changed; None = nothing was trained.
        before: held-out figures before the repair; None = not evaluated.
        after: the same after it.
        change: their paired differences; None = not computed.
        cause: what the causal check said; empty = it was not done.
        experts_are_copies: all experts of a layer are equal.
        against_baselines: what a comparison with other experts said; empty = none was made.
        uniform_loss: nats per token of a guess among all tokens alike; None = not known.
    """

    model: str
    num_safe: int
    num_unsafe: int
    num_union: int
    num_experts: int
    certainty: pd.DataFrame
    selection: IdentifyConfig
    frozen_changed: int | None
    before: Figures | None
    after: Figures | None
    change: Figures | None
    experts_are_copies: bool = False
    against_baselines: str = ""
    cause: str = ""
    uniform_loss: float | None = None


def first_paragraph(found: Findings) -> str:
    """The paragraph."""
    sentences = [_selection_in_words(found), _certainty_in_words(found)]
    if found.experts_are_copies:
        sentences.append(f"{EXPERTS_ARE_COPIES}.")
    if found.before is None or found.after is None:
        sentences.append("The model was not evaluated before and after a repair, so nothing is said about one here.")
    else:
        sentences += _repair_in_words(found, found.before, found.after)
    doubt = found.cause.rstrip(".") or (
        "Routing is an observation, not a cause: experts can follow a topic or a template rather than harm"
    )
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
    of_answers = found.selection.roles == ("response",)
    where = (
        "in answers to its unsafe prompts than in those to its" if of_answers else "on its unsafe prompts than on its"
    )
    how = {
        "risk_diff": (
            f"are unsafe in at least one batch, that is, routed to more often {where} safe ones, "
            f"by a risk difference above {found.selection.threshold:g}"
        ),
        "attribution": (
            "are unsafe in at least one batch, that is, the model's answers to its unsafe prompts hang more on their "
            "weights than those to its safe ones (rule attribution)"
        ),
        "gate": (
            "are unsafe in at least one batch, that is, the model's answers to its unsafe prompts lean more on their output "
            "than those to its safe ones (rule gate)"
        ),
        "comply_refuse": (
            "are unsafe in at least one batch, that is, routed to more often in answers to its unsafe prompts than in "
            f"refusals of the same prompts, by more than {found.selection.threshold:g} (rule comply_refuse)"
        ),
        "random": "were drawn at random for at least one batch, as a control",
    }.get(found.selection.rule, f"were selected for at least one batch, by rule {found.selection.rule}")
    return (
        f"moe-ray compared how often {found.model} routes {'answers to ' * of_answers}{found.num_safe} safe and "
        f"{found.num_unsafe} unsafe prompts to each expert, in {batches} batch{'es' * (batches != 1)}. "
        f"{found.num_union:,} of {found.num_experts:,} experts ({rate(found.num_union / found.num_experts)}) {how}."
    )


def _certainty_in_words(found: Findings) -> str:
    tested = known_significance(found.certainty)
    if tested.empty:
        return "No significance was computed, so nothing is known about how many of them are noise."
    level = significance_level(found.selection)
    significant, total = int(tested.sum()), len(tested)
    test = f"permutation test over prompts, corrected for all experts of the batch, at level {level:g}"
    if significant == 0:
        return (
            f"In no batch is any of them significant ({test}): take the experts named here as not distinguishable from "
            "noise."
        )
    if significant == total:
        return f"In every batch at least one of them is significant ({test}), which does not make each of them so."
    rest = "one" if total - significant == 1 else str(total - significant)
    return (
        f"In {significant} of {total} batches at least one of them is significant ({test}; chance alone would give about "
        f"{total * level:.1g} such batches); in the other {rest} the selection may be noise."
    )


def _repair_in_words(found: Findings, all_before: Figures, all_after: Figures) -> list[str]:
    sentences: list[str] = []
    for name, what in (("unsafe_refusal_rate", "held-out unsafe prompts"), ("safe_refusal_rate", "safe ones")):
        before, after = all_before.get(name), all_after.get(name)
        if not has_interval(before) or not has_interval(after):
            continue
        opening = "After fine-tuning only these experts, the model refused" if not sentences else "It refused"
        verdict = _verdict((found.change or {}).get(name), before, after)
        sentences.append(f"{opening} {rate(after).with_n()} of {what}, against {rate(before)} before; {verdict}.")
    if sentences:
        sentences.append("Brackets are 95% intervals.")
    sizes = [all_after[name]["n"] for name in ("unsafe_refusal_rate", "safe_refusal_rate") if name in all_after]
    if sizes and min(sizes) < _FEW_EXAMPLES:
        sentences.append(f"These are few prompts (n = {min(sizes)} for one kind), hence the wide intervals.")
    unknown = unknown_text(all_before, found.uniform_loss)
    sentences += unknown or [_forgetting((found.change or {}).get("neutral_loss"))]
    if found.frozen_changed is not None:
        sentences.append(
            "No other parameter changed."
            if found.frozen_changed == 0
            else f"{found.frozen_changed} parameters outside of them changed, which must not happen: do not trust this run."
        )
    return sentences


def _verdict(change: Any, before: Any, after: Any) -> str:
    """Whether the model changed: by the paired difference where there is one, else by the two intervals."""
    if has_interval(change):
        shown = difference(change, "points")
        if is_significant(change):
            return f"compared prompt by prompt, a significant {'rise' if change['low'] > 0 else 'fall'} ({shown})"
        return f"compared prompt by prompt, no significant change ({shown})"
    if after["low"] > before["high"] or after["high"] < before["low"]:
        return "the intervals do not overlap"
    return "the intervals overlap, so this may be no change at all"


def _forgetting(change: Any) -> str:
    if not has_interval(change):
        return ""
    said = ("rose" if change["low"] > 0 else "fell") if is_significant(change) else "did not change significantly"
    return f"Loss on neutral text {said} ({difference(change, 'nats/token')})."
