"""Settings of what runs many trainings: sweep, comparison with baselines, rounds."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from moe_ray.config.fields import _setting, require


@dataclass(frozen=True, kw_only=True)
class SweepConfig:
    """The search for better settings, on the validation split, from the one stored capture."""

    run: bool = _setting(False, "full.py sweeps first and goes on with the winner; sweep.py always sweeps")
    space: Mapping[str, Any] = _setting(
        {"identify.threshold": [0.02, 0.05, 0.1], "identify.top_k": [10, 20, 50]},
        "what is searched: any identify.* or finetune.* key to a list of values, or to one of {uniform: [LOW, HIGH]}, "
        "{loguniform: [LOW, HIGH]}, {randint: [LOW, HIGH]} (HIGH left out)",
    )
    search: Literal["grid", "random", "optuna"] = _setting(
        "grid", "grid = every combination of the lists; random = drawn; optuna = drawn where earlier trials did well"
    )
    num_trials: int = _setting(16, "trials of search random and optuna")
    scheduler: Literal["none", "asha"] = _setting(
        "none",
        "asha = evaluate after every epoch and stop the trials that are behind; none = evaluate once, at the end",
    )
    objective: Literal["refusal_margin", "unsafe_refusal", "target_loss"] = _setting(
        "refusal_margin",
        "what a trial is ranked by, on the validation split: refusal_margin = unsafe refusal rate minus safe refusal "
        "rate; unsafe_refusal = the first alone; target_loss = minus the loss on target responses",
    )
    max_forgetting: float = _setting(
        0.1,
        "trials that lose more than this on safe target responses, or on neutral text, rank last (nats per token)",
    )
    max_concurrent_trials: int = _setting(1, "trials at once, each with a model of its own")
    cpus_per_trial: float = _setting(1.0, "logical CPUs of one trial")
    gpus_per_trial: float = _setting(0.0, "GPUs of one trial; may be a fraction, so that trials share one; 0 = CPU")

    def __post_init__(self) -> None:
        require(bool(self.space), "sweep.space", self.space, "at least one key")
        require(self.num_trials > 0, "sweep.num_trials", self.num_trials, "1 or more")
        require(self.max_forgetting >= 0, "sweep.max_forgetting", self.max_forgetting, "0 or more")
        require(self.max_concurrent_trials > 0, "sweep.max_concurrent_trials", self.max_concurrent_trials, "1 or more")
        require(self.cpus_per_trial > 0, "sweep.cpus_per_trial", self.cpus_per_trial, "a positive number")
        require(self.gpus_per_trial >= 0, "sweep.gpus_per_trial", self.gpus_per_trial, "0 or more")


BASELINES = (
    "freezing_only",
    "global",
    "global_union",
    "random",
    "shuffled",
    "esft_token",
    "esft_gate",
    "all_experts",
    "full",
)

"""What per-batch masks can be compared with; `baselines.py` says what each is."""


@dataclass(frozen=True, kw_only=True)
class CompareConfig:
    """Other ways to spend the same budget, compared with per-batch masks on the same held-out prompts."""

    run: bool = _setting(False, "full.py runs the baselines too; compare.py always does")
    names: tuple[str, ...] = _setting((), f"which of {', '.join(BASELINES)}; empty = all that the stored counts allow")
    draws: int = _setting(3, "draws of random experts and of shuffled masks, each a row of its own")
    max_concurrent: int = _setting(
        1, "baselines at once, each with a model of its own and finetune.gpus_per_worker GPUs"
    )
    full_learning_rate: float = _setting(
        0.0, "learning rate of full fine-tuning; 0 = finetune.learning_rate, which may be too high for it"
    )

    def __post_init__(self) -> None:
        unknown = sorted(set(self.names) - set(BASELINES))
        require(not unknown, "compare.names", unknown, "some of " + ", ".join(BASELINES))
        require(self.max_concurrent > 0, "compare.max_concurrent", self.max_concurrent, "1 or more")
        require(self.draws > 0, "compare.draws", self.draws, "1 or more")
        require(self.full_learning_rate >= 0, "compare.full_learning_rate", self.full_learning_rate, "0 or more")


@dataclass(frozen=True, kw_only=True)
class RoundsConfig:
    """Fine-tuning again for batches that stay below their target."""

    max_rounds: int = _setting(1, "rounds of fine-tuning at most; 1 = no further round")
    target: float = _setting(
        0.9, "unsafe refusal rate that each batch should reach on the validation examples of its category (0 to 1)"
    )
    action: Literal["weight", "identify"] = _setting(
        "weight",
        "what a batch below its target gets in the next round: weight = its experts take larger steps; identify = its "
        "unsafe experts are identified anew from the routing of the model as it is by then",
    )
    weight_factor: float = _setting(2.0, "action weight: what a lagging batch's weight is multiplied by each round")
    min_improvement: float = _setting(
        0.005, "a round that lowers the mean shortfall plus over-refusal by less than this is the last (0 to 1)"
    )

    def __post_init__(self) -> None:
        require(self.max_rounds > 0, "rounds.max_rounds", self.max_rounds, "1 or more")
        require(0 < self.target <= 1, "rounds.target", self.target, "a fraction above 0, at most 1")
        require(self.weight_factor > 1, "rounds.weight_factor", self.weight_factor, "a number above 1")
        require(0 <= self.min_improvement < 1, "rounds.min_improvement", self.min_improvement, "a fraction below 1")
