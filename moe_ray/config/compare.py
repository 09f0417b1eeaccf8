"""Settings of the comparison with baselines."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal, get_args

from moe_ray.config.fields import setting
from moe_ray.config.section import Section

Baseline = Literal[
    "freezing_only",
    "global",
    "global_union",
    "random",
    "shuffled",
    "esft_token",
    "esft_gate",
    "all_experts",
    "full",
]

BASELINES: tuple[Baseline, ...] = get_args(Baseline)
"""What per-batch masks can be compared with."""

_MEANINGS: Mapping[Baseline, str] = {
    "freezing_only": "the same experts learn, but tokens go where the model routes them",
    "global": "one list for all batches, of the largest mean risk differences, as many as the average batch has",
    "global_union": "one list for all batches, as many experts as the union has",
    "random": "experts drawn at random, as many of each layer and batch",
    "shuffled": "each batch gets the mask of another batch",
    "esft_token": "the experts with the largest share of a layer's unsafe tokens, as many per batch",
    "esft_gate": "the experts with the largest share of a layer's gate weight on unsafe tokens, as many per batch",
    "all_experts": "every expert of every MoE layer learns, and any may be routed",
    "full": "every parameter learns, under natural routing",
}


@dataclass(frozen=True, kw_only=True)
class CompareConfig(Section):
    """Other ways to spend the same budget, compared with per-batch masks on the same held-out prompts."""

    group: ClassVar[str] = "compare"

    run: bool = setting(
        False, "the full workflow trains the baselines too; the compare workflow always does", affects="search"
    )
    names: tuple[Baseline, ...] = setting(
        (),
        "which baselines are trained; empty = all that the stored counts allow; "
        + "; ".join(f"{name} = {meaning}" for name, meaning in _MEANINGS.items()),
        affects="search",
    )
    draws: int = setting(
        3,
        "how often the baselines random and shuffled are repeated with other random numbers, each a row of its own",
        affects="search",
        at_least=1,
    )
    max_concurrent: int = setting(
        1,
        "baselines at the same time, each with a model of its own and finetune.gpus_per_worker GPUs",
        affects="speed",
        at_least=1,
    )
    full_learning_rate: float = setting(
        0.0,
        "learning rate of the baseline full; 0 = finetune.learning_rate, which may be too high for it",
        affects="search",
        at_least=0,
    )
