"""Settings of the sweep."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from moe_ray.config.auto import Auto
from moe_ray.config.fields import setting
from moe_ray.config.section import Section


@dataclass(frozen=True, kw_only=True)
class SweepConfig(Section):
    """The search for better settings, measured on the validation examples, from the one stored capture."""

    group: ClassVar[str] = "sweep"

    run: bool = setting(
        False,
        "the full workflow sweeps first and goes on with the best trial's settings; the sweep workflow always sweeps",
        affects="search",
    )
    space: Mapping[str, Any] = setting(
        {"identify.threshold": [0.02, 0.05, 0.1], "identify.top_k": [10, 20, 50]},
        "what is searched: any identify.* or finetune.* key, with a list of values or one of {uniform: [LOW, HIGH]}, "
        "{loguniform: [LOW, HIGH]} and {randint: [LOW, HIGH]} (whole numbers from LOW to HIGH-1)",
        affects="search",
    )
    search: Literal["grid", "random", "optuna"] = setting(
        "grid",
        "which values are tried: grid = every combination of the lists; random = drawn at random; optuna = drawn where "
        "earlier trials did well",
        affects="search",
    )
    num_trials: int = setting(16, "search random and optuna: number of trials", affects="search", at_least=1)
    scheduler: Literal["none", "asha"] = setting(
        "none",
        "none = evaluate each trial once, at its end; asha = evaluate after every epoch and stop the trials that are behind",
        affects="search",
    )
    objective: Literal["refusal_margin", "unsafe_refusal", "target_loss"] = setting(
        "refusal_margin",
        "what trials are ranked by, on the validation examples: refusal_margin = refusal rate on unsafe prompts minus that "
        "on safe prompts; unsafe_refusal = the first alone; target_loss = the loss on the targets, lowest first",
        affects="search",
    )
    max_forgetting: float = setting(
        0.1,
        "trials whose loss on safe targets or on neutral text rises by more than this (nats per token) rank last",
        affects="search",
        at_least=0,
    )
    max_concurrent_trials: int = setting(
        1, "trials at the same time, each with a model of its own", affects="speed", at_least=1
    )
    cpus_per_trial: float = setting(1.0, "logical CPUs of one trial", affects="speed", above=0)
    gpus_per_trial: float | Auto = setting(  # noqa: RUF009
        "auto",
        "GPUs of one trial; may be a fraction, so that trials share one; auto = as many as the model's weights need, where "
        "the cluster has GPUs; 0 = CPU",
        affects="speed",
        at_least=0,
    )

    def faults(self) -> Iterator[str]:
        """Yields whether there is nothing to search."""
        if not self.space:
            yield self.wrong("space", "at least one key")
