"""What a training takes beside the weights, and whether the machines have it: asked when the selected experts are known."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

from moe_ray.config.auto import gpus_of
from moe_ray.config.finetune import FinetuneConfig
from moe_ray.config.run import Config
from moe_ray.errors import InputError
from moe_ray.resources.fitting import RESERVED, gpus_for
from moe_ray.resources.model_size import BYTES, ModelSize
from moe_ray.resources.nodes import GB, Node

_COPIES = 2
"""Of every learned number: itself and its gradient, on every worker."""

_MEANS = 2
"""AdamW's, of the experts that a worker owns."""


def training_bytes(model: ModelSize, num_experts: int, *, dtype: str, config: FinetuneConfig) -> int:
    """Bytes of learned copies, gradients and optimiser state on one worker.

    For a number 16 in float32 and 8 in half precision where one worker trains; half of it is optimiser state, which several
    share out among them, expert by expert. Over codes it is a copy in the model's type more.

    Args:
        model: which one.
        num_experts: of the union.
        dtype: that the model is loaded in.
        config: in which type experts are learned, and by how many workers at least.
    """
    learned_in = "float32" if config.dtype == "float32" else dtype
    # Where the model's own are codes, what was learned lies over them in the model's type.
    over_codes = BYTES[dtype] if model.quantisation != "none" else 0
    of_all = num_experts * (BYTES[learned_in] * _COPIES + over_codes)
    of_own = math.ceil(num_experts / max(1, config.num_workers)) * BYTES[learned_in] * _MEANS
    return model.expert_parameters * (of_all + of_own)


def worker_weights(model: ModelSize, config: Config) -> int:
    """Bytes of weights that a training worker holds: all, or its part where FSDP2 shards them, beside a layer or two.

    Args:
        model: which one.
        config: with the type that was decided.
    """
    workers = config.finetune.num_workers if config.finetune.shard != "none" else 1
    return model.bytes_in(config.model.dtype) // workers


@dataclass(frozen=True, kw_only=True)
class Room:
    """The machines of a run and its model.

    Attributes:
        model: its numbers.
        nodes: the machines.
        may_grow: others may come, so what does not fit now may fit later.
    """

    model: ModelSize
    nodes: Sequence[Node]
    may_grow: bool = False

    def to_train(self, config: Config, num_experts: int, *, may_spread: bool) -> FinetuneConfig:
        """The settings of a training of so many experts, with as many GPUs for a worker as it takes.

        Args:
            config: with the type that was decided.
            num_experts: of the union.
            may_spread: a worker may have more GPUs than the settings say, as where they said `auto`.

        Raises:
            InputError: weights and training state have no room.
        """
        settings, dtype = config.finetune, config.model.dtype
        is_sharded = settings.shard != "none"
        weights, state = self._parts(config, num_experts)
        needed = weights + state
        may_spread = may_spread and not is_sharded
        gpus = gpus_of(settings.gpus_per_worker)
        with_gpus = [node for node in self.nodes if node.gpus]
        if gpus and with_gpus:
            fitting = [
                wanted for node in with_gpus if (wanted := gpus_for(needed, node.gpu_memory)) <= max(gpus, node.gpus)
            ]
            if fitting and min(fitting) <= gpus:
                return settings
            if fitting and may_spread:
                return replace(settings, gpus_per_worker=float(min(fitting)))
            has = max(min(math.ceil(gpus), node.gpus) * (node.gpu_memory or 0) for node in with_gpus)
            where = "on the GPUs of a worker"
        else:
            has = max((node.memory for node in self.nodes), default=needed + RESERVED) - RESERVED
            where = "on a node"
        if needed <= has or self.may_grow:
            return settings
        raise InputError(
            f"fine-tuning of {num_experts} experts: got {has / GB:.1f} GB {where}, expected {needed / GB:.1f} GB: "
            f"{weights / GB:.1f} for the weights in {dtype}, and {state / GB:.1f} for what is learned, "
            f"its gradients and the optimiser's state; lower identify.top_k, "
            f"{'set finetune.dtype=model, ' if settings.dtype == 'float32' else ''}raise finetune."
            f"{'num_workers' if is_sharded else 'gpus_per_worker'}, or use machines with more memory"
        )

    def of_worker(self, config: Config, num_experts: int) -> int:
        """Bytes that a training worker takes: its weights, and what is learned.

        Args:
            config: with the type that was decided.
            num_experts: of the union.
        """
        return sum(self._parts(config, num_experts))

    def _parts(self, config: Config, num_experts: int) -> tuple[int, int]:
        """Bytes of a worker's weights, and of what it learns with gradients and the optimiser's state."""
        settings, dtype = config.finetune, config.model.dtype
        return worker_weights(self.model, config), training_bytes(self.model, num_experts, dtype=dtype, config=settings)
