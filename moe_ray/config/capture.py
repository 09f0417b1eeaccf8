"""Settings of the routing capture."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar, Literal

from moe_ray.config.auto import Auto, gpus_of, processes_of
from moe_ray.config.fields import setting
from moe_ray.config.section import Section

Score = Literal["attribution", "gate", "reap", "refusal"]
"""What can be measured of every expert beside its routing."""

Engine = Literal["transformers", "vllm"]
"""What runs a model."""


@dataclass(frozen=True, kw_only=True)
class CaptureConfig(Section):
    """How routing is counted."""

    group: ClassVar[str] = "capture"

    engine: Engine = setting(  # noqa: RUF009
        "transformers",
        "what runs the model: vllm needs moe-ray[vllm], counts natural routing only, and measures neither router weights "
        "nor scores, so it wants identify.weighting=tokens or prompts and a rule that counts. It gets the same token ids, "
        "and its first window is counted by transformers too, see capture.min_parity",
        affects="counts",
    )
    min_parity: float = setting(
        0.85,
        "engine vllm: smallest share of a window's choices (tokens times MoE layers) that must be the same set of experts "
        "under transformers; with fewer the run ends. Other kernels decide near-ties in another way, so 1 is too much in "
        "half precision; rows that belong to other tokens or layers give much less",
        affects="speed",
        at_least=0,
        at_most=1,
    )
    num_actors: int | Auto = setting(  # noqa: RUF009
        "auto",
        "processes that count at the same time, each with a copy of the model; auto = as many as the GPUs "
        "have room for, and without GPUs one on each node",
        affects="speed",
        at_least=1,
    )
    max_actors: int = setting(
        0,
        "more processes are started, up to this many, while there is work and the cluster has room; 0 = always num_actors",
        affects="speed",
        at_least=0,
    )
    gpus_per_actor: float | Auto = setting(  # noqa: RUF009
        "auto",
        "GPUs of one process, which may be a fraction; with 2 or more the model is spread over them; auto = as many as its "
        "weights need, where the cluster has GPUs; 0 = CPU",
        affects="speed",
        at_least=0,
    )
    tokens_per_forward: int = setting(
        8192,
        "tokens of one forward pass, padding included; halved by a process whose GPU runs out of memory",
        affects="speed",
        at_least=1,
    )
    weights: bool = setting(
        False,
        "also sum the routing weights of each expert's tokens (the factors that the router puts on its output). What "
        "identify.weighting, identify.rule and compare.names need is measured whether it is on or not",
        affects="counts",
    )
    ids: bool = setting(
        False,
        "also keep which experts each token was routed to, beside the counts: a byte for every token, layer and expert",
        affects="counts",
    )
    scores: tuple[Score, ...] = setting(
        (),
        "also measure, for every example: attribution = |w * dL/dw| of each expert's weights for the example's own answer; "
        "gate = how much that answer leans on each expert's output; reap = router-weighted saliency; refusal = the routing "
        "of each unsafe example's target, which comply_refuse compares with that of its answer. What identify.rule needs is "
        "measured whether named here or not",
        affects="counts",
    )
    template_tokens: bool = setting(
        True,
        "count the tokens of the chat template (role headers, start and end tokens) as well as those of the messages",
        affects="counts",
    )
    max_tokens: int = setting(
        0, "longest example, in tokens; 0 = the model's max_position_embeddings", affects="counts", at_least=0
    )
    too_long: Literal["skip", "truncate", "error"] = setting(
        "skip",
        "what is done with a longer example: skip = it is put in quarantine; truncate = its first max_tokens tokens are "
        "counted, and it is listed; error = the capture stops",
        affects="counts",
    )
    max_bad_share: float = setting(
        0.05,
        "largest fraction of the examples that may be unusable, such as too long; these are put in quarantine, and the run "
        "goes on without them; with more of them it stops",
        affects="speed",
        at_least=0,
        at_most=1,
    )
    generate: bool = setting(
        True,
        "let the model itself answer examples that come without a `response`, and count the answer's tokens too; without "
        "answers identify.roles can only be [prompt]",
        affects="counts",
    )
    max_new_tokens: int = setting(64, "generate: longest generated answer, in tokens", affects="counts", at_least=1)
    temperature: float = setting(
        0.0,
        "generate: 0 = always the most likely token; above 0 = sampled at this temperature, with random numbers of each "
        "example's own",
        affects="counts",
        at_least=0,
    )

    def faults(self) -> Iterator[str]:
        """Yields what is wrong with the number of actors and their GPUs."""
        if 0 < self.max_actors < processes_of(self.num_actors):
            yield self.wrong("max_actors", "0, or at least capture.num_actors")
        gpus = gpus_of(self.gpus_per_actor)
        if gpus > 1 and not gpus.is_integer():
            yield self.wrong("gpus_per_actor", "a fraction up to 1, or a whole number")
