"""Settings of the HTML report."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from moe_ray.config.fields import setting
from moe_ray.config.section import Section


@dataclass(frozen=True, kw_only=True)
class ReportConfig(Section):
    """What the HTML report shows."""

    group: ClassVar[str] = "report"

    batches: int = setting(
        24,
        "heat maps of single batches, picked evenly from all batches; fewer keep the page small",
        affects="presentation",
        at_least=1,
    )
    examples: int = setting(
        6, "held-out examples of each kind, with their answers; 0 = none", affects="presentation", at_least=0
    )
