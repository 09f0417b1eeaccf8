"""Settings of identification: which experts of a batch are called unsafe, and how sure one must be."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal

from moe_ray.config.fields import setting
from moe_ray.config.section import Section

SCORES_OF_RULE: Mapping[str, tuple[str, ...]] = {
    "attribution": ("attribution",),
    "gate": ("gate",),
    "gate_refuse": ("gate", "refusal"),
    "comply_refuse": ("refusal",),
    "reap": ("reap",),
}
"""What of `capture.scores` a rule needs; rules that are not here need routing only."""

RULES_BY_WEIGHT = ("esft_gate",)
"""Rules that need routed weights, whatever the weighting."""

RULES_WITHOUT_A_TEST = ("top_routed", "esft_token", "esft_gate")
"""Rules that look at unsafe prompts alone, so that no difference of theirs is tested."""

_MOST_EXPERTS_PER_TOKEN = 256
"""No family routes a token to more; how many the model's are is not known here."""


@dataclass(frozen=True, kw_only=True)
class IdentifyConfig(Section):
    """Which experts of a batch are called unsafe, and how sure one must be."""

    group: ClassVar[str] = "identify"

    roles: tuple[Literal["prompt", "response", "thought"], ...] = setting(
        ("response",),
        "whose tokens count: those of the prompt, of the response (a given one, or the model's own, see capture.generate), "
        "or of both",
        affects="masks",
    )
    rule: Literal[
        "risk_diff",
        "per_layer",
        "attribution",
        "gate",
        "gate_refuse",
        "comply_refuse",
        "reap",
        "top_routed",
        "esft_token",
        "esft_gate",
        "random",
    ] = setting(
        "risk_diff",
        "which experts of a batch are unsafe: risk_diff = the top_k largest risk differences above threshold; per_layer "
        "= the per_layer_quota largest of each layer; attribution, gate, reap = the top_k whose score (capture.scores) on "
        "unsafe prompts is most above that on safe ones, if above min_share of the batch's largest; comply_refuse = the "
        "top_k that answers to unsafe prompts are routed to more than refusals of the same prompts, above threshold; "
        "gate_refuse = the same comparison of gate scores, above min_share; top_routed = the per_layer_quota of each layer "
        "with the most unsafe tokens; esft_token, esft_gate = the experts of each layer that together take the share top_p "
        "of the unsafe tokens, or of their routing weights; random = as many of each layer as risk_diff gives, drawn at "
        "random (a control)",
        affects="masks",
    )
    weighting: Literal["tokens", "prompts", "activation"] = setting(
        "activation",
        "what an expert's rate is: tokens = tokens routed to it / all tokens; prompts = mean of each prompt's own rate, so "
        "that long prompts count no more than short ones; activation = as tokens, but a routed token counts by the part of "
        "its router weight that the expert gets, and not alike for each of its experts; rule comply_refuse counts tokens "
        "alike there too. The weights are measured whether capture.weights is on or not",
        affects="masks",
    )
    threshold: float = setting(
        0.05,
        "an unsafe expert's risk difference (its rate on unsafe tokens minus its rate on safe ones) is above this; with "
        "rule comply_refuse, its rate in answers minus that in refusals. Rates are 1 at most, and so are differences, but "
        "with weighting=activation an expert's rate is up to the number of experts per token",
        affects="masks",
        at_least=-_MOST_EXPERTS_PER_TOKEN,
        below=_MOST_EXPERTS_PER_TOKEN,
    )
    min_share: float = setting(
        0.1,
        "rules attribution, gate, gate_refuse and reap, whose scores have no scale of their own: an unsafe expert's score "
        "is above this share of the largest of its batch",
        affects="masks",
        at_least=0,
        below=1,
    )
    top_k: int = setting(
        50,
        "most unsafe experts of a batch; those with the largest risk difference are kept",
        affects="masks",
        at_least=1,
    )
    per_layer_quota: int = setting(
        4, "rules per_layer and top_routed: most unsafe experts of each layer", affects="masks", at_least=1
    )
    top_p: float = setting(
        0.2,
        "rules esft_token and esft_gate: share of a layer's tokens or routing weight to cover",
        affects="masks",
        above=0,
        at_most=1,
    )
    alpha: float = setting(
        0.0,
        "leave out selected experts whose p-value, after correction, is above this; 0 = leave none out",
        affects="masks",
        at_least=0,
        below=1,
    )
    correction: Literal["maxt", "bh", "none"] = setting(
        "maxt",
        "correction of the p-values that alpha is compared with, for testing many experts: maxt = family-wise error rate; "
        "bh = false discovery rate; none = each expert's own p-value",
        affects="masks",
    )
    stability: float = setting(
        0.0,
        "leave out experts that are selected in less than this fraction of the resamples; 0 = leave none out",
        affects="masks",
        at_least=0,
        at_most=1,
    )
    permutations: int = setting(
        20_000,
        "permutations of a batch's labels that the p-values come from: every possible one if there are no more than this, "
        "else this many at random; 0 = no p-values. 2000 save a fifth of the time of 8 safe and 8 unsafe prompts; "
        "p then comes in steps of 0.0005 and hangs on the draw: one of 0.05 by 0.005 (standard error)",
        affects="masks",
        at_least=0,
    )
    compiled: bool = setting(
        True,
        "count permutations with a small C program, which is built at first use where the machine has a C compiler; "
        "without it the same counts take several times longer",
        affects="speed",
    )
    resamples: int = setting(
        200, "bootstrap resamples of a batch's prompts, for stability; 0 = none", affects="masks", at_least=0
    )

    def faults(self) -> Iterator[str]:
        """Yields what is wrong with the threshold or the roles, and filters that miss what they need."""
        # Rates by router weight reach the number of experts per token, which only the model says.
        are_plain_rates = self.weighting != "activation" or self.rule == "comply_refuse"
        if are_plain_rates and not -1 <= self.threshold < 1:
            yield self.wrong("threshold", "at least -1 and below 1, as differences of rates of tokens or prompts are")
        if not self.roles:
            yield self.wrong("roles", "prompt, response or both")
        if self.alpha and not self.permutations:
            yield self.wrong("permutations", "1 or more, since identify.alpha is on")
        if self.stability and not self.resamples:
            yield self.wrong("resamples", "1 or more, since identify.stability is on")
        if (self.alpha or self.stability) and self.rule in RULES_WITHOUT_A_TEST:
            yield self.wrong("rule", "one that compares two labels, such as risk_diff, where alpha or stability is on")
