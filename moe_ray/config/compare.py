"""Settings of the comparison with baselines."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal, get_args

from moe_ray.config.fields import setting
from moe_ray.config.finetune import FinetuneConfig
from moe_ray.config.section import Section, field_types

POLICY = "policy:"
"""Begins the name of a baseline that trains the same experts under another value of `finetune.routing`."""

POLICIES: tuple[str, ...] = get_args(field_types(FinetuneConfig)["routing"])
"""The values of `finetune.routing`."""

_MEANINGS: Mapping[str, str] = {
    "mask_only": "nothing learns: prompts are routed around the unsafe experts of their batch",
    "global": "one list for all batches, of the largest means of what the masks were chosen by, as many as the average "
    "batch has",
    "global_union": "one list for all batches, as many experts as the union has",
    "random": "experts drawn at random, as many of each layer and batch",
    "shuffled": "each batch gets the mask of a batch of another category",
    "busiest": "the experts with most unsafe tokens, as many of each layer and batch",
    "esft_token": "the experts with the largest share of a layer's unsafe tokens, as many per batch",
    "esft_gate": "the experts with the largest share of a layer's gate weight on unsafe tokens, as many per batch",
    "reap": "the experts with the largest REAP saliency on unsafe prompts, as many of each layer and batch",
    "moe_sieve": "LoRA on the most routed experts of each layer, the same for all batches",
    "lora_same": "LoRA on each batch's own experts",
    "lora_all": "LoRA on all experts",
    "attention_only": "the attention layers learn, and nothing else",
    "router_only": "the routers learn, and nothing else",
    "all_experts": "every expert of every MoE layer learns, and any may be routed",
    "full": "every parameter learns, under natural routing",
}

BASELINES: tuple[str, ...] = (*_MEANINGS, *(f"{POLICY}{name}" for name in POLICIES))
"""What per-batch masks can be compared with."""

if TYPE_CHECKING:
    Baseline = str
else:
    # With the policies there are: one that is added to `finetune.routing` can be compared without a word here.
    Baseline = Literal[BASELINES]


@dataclass(frozen=True, kw_only=True)
class CompareConfig(Section):
    """Other ways to spend the same budget, compared with per-batch masks on the same held-out prompts."""

    group: ClassVar[str] = "compare"

    run: bool = setting(
        False, "the full workflow trains the baselines too; the compare workflow always does", affects="search"
    )
    names: tuple[Baseline, ...] = setting(
        (),
        "which baselines are trained; empty = all that the stored counts allow, with one other policy; "
        + "; ".join(f"{name} = {meaning}" for name, meaning in _MEANINGS.items())
        + f"; {POLICY}NAME = the same experts learn under finetune.routing=NAME",
        affects="search",
    )
    budget: Literal["steps", "parameters"] = setting(
        "steps",
        "what is equal in all arms: steps = the optimiser steps and their batches; parameters = these and, as nearly as "
        "an arm can, the number of parameters that train, which is that of the per-batch masks' union",
        affects="search",
    )
    seeds: int = setting(
        1,
        "how often every arm is trained, each time in another order of batches; intervals are of means over them",
        affects="search",
        at_least=1,
    )
    at: tuple[float, ...] = setting(
        (0.25, 0.5, 1.0),
        "after which shares of its steps every arm is measured; the last is 1, and the learning rate's schedule is that of "
        "all steps. At the end several arms may refuse nearly everything, so that only an earlier share can tell them apart",
        affects="search",
        above=0,
        at_most=1,
    )
    draws: int = setting(
        3,
        "how often the baselines random and shuffled are repeated with other random numbers, each a row of its own",
        affects="search",
        at_least=1,
    )
    categories: tuple[str, ...] = setting(
        (),
        "categories whose batches train in all arms; of the others, refusals and lost safe answers are reported on their "
        "own; empty = all",
        affects="search",
    )
    transfer: bool = setting(
        False,
        "train per-batch masks on each category alone, and measure refusals and lost safe answers on every category",
        affects="search",
    )
    transfer_epochs: int = setting(
        0, "passes over a category's batches in such a training; 0 = finetune.epochs", affects="search", at_least=0
    )
    lora_rank: int = setting(
        8,
        "rank of the LoRA factors of an expert's matrices; where compare.budget=parameters it is chosen instead",
        affects="search",
        at_least=1,
    )
    lora_learning_rate: float = setting(
        2e-4,  # ten times that of whole weights, as Schulman et al. (LoRA Without Regret, 2025) found best
        "learning rate of the LoRA baselines; 0 = finetune.learning_rate",
        affects="search",
        at_least=0,
    )
    full_learning_rate: float = setting(
        0.0,
        "learning rate of the baseline full; 0 = finetune.learning_rate, which may be too high for it",
        affects="search",
        at_least=0,
    )
    policy_boost: float = setting(
        2.0,
        "finetune.boost of the policies that need one, where finetune.boost is 0",
        affects="search",
        above=0,
    )
    max_concurrent: int = setting(
        1,
        "baselines at the same time, each with a model of its own and finetune.gpus_per_worker GPUs",
        affects="speed",
        at_least=1,
    )

    def faults(self) -> Iterator[str]:
        """Yields what is wrong with the shares of steps."""
        if not self.at or sorted(set(self.at)) != list(self.at) or self.at[-1] != 1:
            yield self.wrong("at", "shares in ascending order, the last of them 1, such as [0.25,0.5,1]")
