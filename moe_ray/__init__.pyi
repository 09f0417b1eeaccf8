from .ablation.ablate import Ablation
from .errors import InputError
from .evaluation.held_out import Evaluation
from .experts import Expert, ExpertMasks, masks_from_experts
from .finetuning.adapter import adapter_applied, apply_adapter, merge_adapter, save_adapter
from .finetuning.callbacks import Callback
from .finetuning.fine_tune import FineTuned
from .finetuning.trainable_experts import trainable_experts
from .identification.identify import Identification
from .models.moe_layers import find_moe_layers
from .pipeline import ablate, capture, evaluate, fine_tune, identify, prepare
from .prompts.batches import Batch
from .prompts.examples import Example, read_examples
from .prompts.prompt_set import Prompts
from .repaired import Adapter, load_repaired
from .routing.counts import RoutingCounts
from .routing.masking import route_through
from .run_directory import open_run

__all__ = [
    "Ablation",
    "Adapter",
    "Batch",
    "Callback",
    "Evaluation",
    "Example",
    "Expert",
    "ExpertMasks",
    "FineTuned",
    "Identification",
    "InputError",
    "Prompts",
    "RoutingCounts",
    "ablate",
    "adapter_applied",
    "apply_adapter",
    "capture",
    "evaluate",
    "find_moe_layers",
    "fine_tune",
    "identify",
    "load_repaired",
    "masks_from_experts",
    "merge_adapter",
    "open_run",
    "prepare",
    "read_examples",
    "route_through",
    "save_adapter",
    "trainable_experts",
]
