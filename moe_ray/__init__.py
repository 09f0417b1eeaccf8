"""moe-ray: find which experts of a Mixture-of-Experts model answer for unsafe behaviour, and repair only those.

The names below work on any transformers MoE model, with neither Ray nor MLflow installed; `moe_ray.orchestration` and the
scripts in `workflows/` run the same functions on a cluster.
"""

from moe_ray.adapter import adapter_applied, apply_adapter, merge_adapter, save_adapter
from moe_ray.batches import Batch, assemble_batches
from moe_ray.errors import InputError
from moe_ray.examples import Example, read_examples, records_to_examples
from moe_ray.masking import route_through
from moe_ray.moe_layers import Expert, find_moe_layers
from moe_ray.risk import aggregate_risk, risk_differences
from moe_ray.routing import RoutingCounts, count_batches
from moe_ray.selection import ExpertMasks, select_unsafe_experts
from moe_ray.trainable import TrainableExperts, trainable_experts

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
    "merge_adapter",
    "read_examples",
    "records_to_examples",
    "risk_differences",
    "route_through",
    "save_adapter",
    "select_unsafe_experts",
    "trainable_experts",
]
