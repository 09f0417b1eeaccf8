"""Settings of identification: which experts of a batch are called unsafe, and how sure one must be."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from moe_ray.config.fields import _setting, require


@dataclass(frozen=True, kw_only=True)
class IdentifyConfig:
    """Which experts of a batch are called unsafe, and how sure one must be."""

    roles: tuple[str, ...] = _setting(("prompt",), "tokens whose routing counts: prompt, response or both")
    rule: Literal["risk_diff", "per_layer", "esft_token", "esft_gate", "random"] = _setting(
        "risk_diff",
        "risk_diff = above threshold, the top_k largest of the batch; per_layer = the per_layer_quota largest of each "
        "layer; esft_token, esft_gate = cumulative top_p per layer over unsafe tokens, or over their gate weights; "
        "random = as many of each layer as risk_diff gives, drawn by seed (a control)",
    )
    weighting: Literal["tokens", "prompts", "activation"] = _setting(
        "tokens",
        "what a rate is: tokens = routed tokens / all tokens; prompts = mean of each prompt's own rate, so that long "
        "prompts count no more than short ones; activation = routed weight / all tokens",
    )
    threshold: float = _setting(0.05, "an unsafe expert's risk_diff is above this (difference of fractions, -1 to 1)")
    top_k: int = _setting(50, "at most this many unsafe experts a batch, the largest risk_diff first")
    per_layer_quota: int = _setting(4, "rule per_layer: at most this many unsafe experts of each layer")
    top_p: float = _setting(0.2, "rules esft_*: share of a layer's tokens or gate weight to cover (0 to 1)")
    alpha: float = _setting(0.0, "drop selected experts whose corrected p is above this (0 to 1); 0 = off")
    correction: Literal["maxt", "bh", "none"] = _setting(
        "maxt", "p that alpha is held against: maxt = family-wise, bh = false discovery rate, none = each expert's own"
    )
    stability: float = _setting(
        0.0, "drop experts selected in less than this share of prompt resamples (0 to 1); 0 = off"
    )
    permutations: int = _setting(
        20_000, "relabellings of a batch's prompts: all of them where there are no more, else this many; 0 = no p"
    )
    resamples: int = _setting(200, "bootstrap resamples of a batch's prompts, for stability; 0 = none")

    def __post_init__(self) -> None:
        require(-1 <= self.threshold < 1, "identify.threshold", self.threshold, "a number from -1 to below 1")
        require(self.top_k > 0, "identify.top_k", self.top_k, "1 or more")
        require(self.per_layer_quota > 0, "identify.per_layer_quota", self.per_layer_quota, "1 or more")
        require(0 < self.top_p <= 1, "identify.top_p", self.top_p, "a fraction above 0, at most 1")
        require(0 <= self.alpha < 1, "identify.alpha", self.alpha, "a fraction from 0 to below 1")
        require(0 <= self.stability <= 1, "identify.stability", self.stability, "a fraction from 0 to 1")
        require(self.permutations >= 0, "identify.permutations", self.permutations, "0 or more")
        require(self.resamples >= 0, "identify.resamples", self.resamples, "0 or more")
        self._check_filters()
        known = {"prompt", "response"}
        require(bool(self.roles) and set(self.roles) <= known, "identify.roles", self.roles, "prompt, response or both")

    def _check_filters(self) -> None:
        if self.alpha:
            require(self.permutations > 0, "identify.permutations", 0, "1 or more, since identify.alpha is on")
        if self.stability:
            require(self.resamples > 0, "identify.resamples", 0, "1 or more, since identify.stability is on")
        if self.alpha or self.stability:
            tested = self.rule in ("risk_diff", "per_layer", "random")
            require(tested, "identify.rule", self.rule, "risk_diff or per_layer where alpha or stability is on")
