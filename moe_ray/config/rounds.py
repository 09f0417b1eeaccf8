"""Settings of further rounds of fine-tuning."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from moe_ray.config.fields import setting
from moe_ray.config.section import Section


@dataclass(frozen=True, kw_only=True)
class RoundsConfig(Section):
    """Fine-tuning again for batches that stay below their target."""

    group: ClassVar[str] = "rounds"

    max_rounds: int = setting(
        1, "most rounds of fine-tuning; 1 = fine-tune once, no further round", affects="weights", at_least=1
    )
    target: float = setting(
        0.9,
        "refusal rate that each batch should reach on the unsafe validation examples of its category",
        affects="weights",
        above=0,
        at_most=1,
    )
    action: Literal["weight", "identify"] = setting(
        "weight",
        "what the next round does for a batch below its target: weight = its experts take larger steps; identify = its "
        "unsafe experts are identified anew from the routing of the model as trained so far",
        affects="weights",
    )
    weight_factor: float = setting(
        2.0,
        "action weight: the weight of a batch below its target is multiplied by this each round",
        affects="weights",
        above=1,
    )
    min_improvement: float = setting(
        0.005,
        "no further round after one that lowers the mean shortfall from the target plus the refusal rate on safe prompts "
        "by less than this",
        affects="weights",
        at_least=0,
        below=1,
    )
