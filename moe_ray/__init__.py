"""moe-ray: find which experts of a Mixture-of-Experts model answer for unsafe behaviour, and repair only those.

The names below work on any transformers MoE model, with neither Ray nor MLflow installed; `moe_ray.orchestration` and the
scripts in `workflows/` run the same functions on a cluster. Each name is imported when it is first used, so that a wrong
configuration is reported before torch is loaded.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from moe_ray.errors import InputError
    from moe_ray.experts import Expert, ExpertMasks
    from moe_ray.finetuning.adapter import adapter_applied, apply_adapter, merge_adapter, save_adapter
    from moe_ray.finetuning.fine_tune import fine_tune
    from moe_ray.finetuning.trainable_experts import TrainableExperts, trainable_experts
    from moe_ray.identification.risk import aggregate_risk, risk_differences
    from moe_ray.identification.selection import select_unsafe_experts
    from moe_ray.models.moe_layers import find_moe_layers
    from moe_ray.prompts.batches import Batch, assemble_batches
    from moe_ray.prompts.examples import Example, read_examples, records_to_examples
    from moe_ray.routing.capture import count_batches
    from moe_ray.routing.counts import RoutingCounts
    from moe_ray.routing.masking import route_through

_HOMES = {
    "errors": ("InputError",),
    "experts": (
        "Expert",
        "ExpertMasks",
    ),
    "finetuning.adapter": (
        "adapter_applied",
        "apply_adapter",
        "merge_adapter",
        "save_adapter",
    ),
    "finetuning.fine_tune": ("fine_tune",),
    "finetuning.trainable_experts": (
        "TrainableExperts",
        "trainable_experts",
    ),
    "identification.risk": (
        "aggregate_risk",
        "risk_differences",
    ),
    "identification.selection": ("select_unsafe_experts",),
    "models.moe_layers": ("find_moe_layers",),
    "prompts.batches": (
        "Batch",
        "assemble_batches",
    ),
    "prompts.examples": (
        "Example",
        "read_examples",
        "records_to_examples",
    ),
    "routing.capture": ("count_batches",),
    "routing.counts": ("RoutingCounts",),
    "routing.masking": ("route_through",),
}
_HOME_OF = {name: home for home, names in _HOMES.items() for name in names}

__all__ = [
    "Batch",
    "Example",
    "Expert",
    "ExpertMasks",
    "InputError",
    "RoutingCounts",
    "TrainableExperts",
    "adapter_applied",
    "aggregate_risk",
    "apply_adapter",
    "assemble_batches",
    "count_batches",
    "find_moe_layers",
    "fine_tune",
    "merge_adapter",
    "read_examples",
    "records_to_examples",
    "risk_differences",
    "route_through",
    "save_adapter",
    "select_unsafe_experts",
    "trainable_experts",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME_OF:
        raise AttributeError(f"module 'moe_ray' has no attribute {name!r}")
    return getattr(importlib.import_module(f"moe_ray.{_HOME_OF[name]}"), name)
