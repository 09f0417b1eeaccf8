"""A process that runs trials one after another on one loaded model."""

from __future__ import annotations

from functools import lru_cache

import numpy as np

from moe_ray.artifacts import Folder
from moe_ray.config import ModelConfig
from moe_ray.moe_layers import find_moe_layers
from moe_ray.orchestration.actors import ModelHolder
from moe_ray.orchestration.capture import read_counts
from moe_ray.routing import RoutingCounts
from moe_ray.trainable import count_changed, hash_frozen


class BaseModel(ModelHolder):
    """The base model, which every trial finds as it was loaded.

    Args:
        model: which one.
        num_processes: how many such processes share a machine's cores.
    """

    def __init__(self, model: ModelConfig, num_processes: int) -> None:
        super().__init__(model, num_processes)
        self._hashes = self._hash()

    def check(self) -> None:
        """Makes sure that the trial before left every parameter and buffer as it was, bit for bit.

        Raises:
            RuntimeError: it did not.
        """
        changed = count_changed(self._hashes, self._hash())
        if changed:
            raise RuntimeError(
                f"the trial before left {changed} numbers of the base model changed; this is a fault of ours"
            )

    def _hash(self) -> dict[str, tuple[str, int]]:
        layers = find_moe_layers(self.model)
        return hash_frozen(self.model, np.zeros((len(layers), layers.num_experts), dtype=bool))


@lru_cache(maxsize=1)
def base_model(model: ModelConfig, num_processes: int) -> BaseModel:
    """The base model of this process, loaded when it is first asked for and checked every time."""
    return BaseModel(model, num_processes)


@lru_cache(maxsize=1)
def stored_counts(url: str) -> RoutingCounts:
    """The counts of a finished capture, read once per process."""
    return read_counts(Folder.open(url))
