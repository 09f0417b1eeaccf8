"""Settings of the routing capture."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from moe_ray.config.fields import _setting, require


@dataclass(frozen=True, kw_only=True)
class CaptureConfig:
    """How routing is counted."""

    num_actors: int = _setting(1, "Ray Data actors, each holding one copy of the model; the least number of them")
    max_actors: int = _setting(
        0, "the pool grows to this many actors while there is work and the cluster has room; 0 = always num_actors"
    )
    gpus_per_actor: float = _setting(
        0.0, "GPUs of one actor, which may be a fraction; 0 runs on CPU; with 2 or more the model is spread over them"
    )
    tokens_per_forward: int = _setting(
        8192, "tokens of one forward pass, padding included; halved by an actor whose GPU runs out of memory"
    )
    weights: bool = _setting(False, "also sum routed weights, which identify.weighting=activation and esft_gate need")
    ids: bool = _setting(
        False, "also keep which experts each token was routed to, beside the counts: a byte per token, layer and expert"
    )
    template_tokens: bool = _setting(
        True, "count tokens of the chat template (role headers, start and end tokens) as well as those of the messages"
    )
    max_tokens: int = _setting(0, "the longest example, in tokens; 0 = the model's max_position_embeddings")
    too_long: Literal["skip", "truncate", "error"] = _setting(
        "skip",
        "what becomes of a longer one: skip = quarantined; truncate = its first max_tokens tokens are counted, and it is "
        "listed; error = the capture stops",
    )
    max_bad_share: float = _setting(
        0.05, "share of examples in quarantine above which the capture stops (0 to 1); bad ones up to it are left out"
    )
    generate: bool = _setting(
        False, "the model itself answers examples that come without a response, and that is counted"
    )
    max_new_tokens: int = _setting(64, "length of a generated response, in tokens")
    temperature: float = _setting(
        0.0, "0 = generate greedily; above, sample with this temperature, each example with its own random numbers"
    )

    def __post_init__(self) -> None:
        require(self.num_actors > 0, "capture.num_actors", self.num_actors, "1 or more")
        grows = self.max_actors == 0 or self.max_actors >= self.num_actors
        require(grows, "capture.max_actors", self.max_actors, "0, or at least capture.num_actors")
        require(self.gpus_per_actor >= 0, "capture.gpus_per_actor", self.gpus_per_actor, "0 or more")
        whole = self.gpus_per_actor <= 1 or self.gpus_per_actor == int(self.gpus_per_actor)
        require(whole, "capture.gpus_per_actor", self.gpus_per_actor, "a fraction up to 1, or a whole number")
        require(self.tokens_per_forward > 0, "capture.tokens_per_forward", self.tokens_per_forward, "1 or more")
        require(self.max_tokens >= 0, "capture.max_tokens", self.max_tokens, "0 or more")
        require(0 <= self.max_bad_share <= 1, "capture.max_bad_share", self.max_bad_share, "a fraction from 0 to 1")
        require(self.max_new_tokens > 0, "capture.max_new_tokens", self.max_new_tokens, "1 or more")
        require(self.temperature >= 0, "capture.temperature", self.temperature, "0 or more")
