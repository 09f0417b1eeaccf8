"""What every model-holding process has in common, whether Ray Data or Ray Train runs it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache

import numpy as np
import ray
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import logging as transformers_logging

from moe_ray.config.model import ModelConfig
from moe_ray.finetuning.adapter import adapter_applied
from moe_ray.finetuning.adapter_files import local_adapter
from moe_ray.finetuning.frozen import count_changed, hash_frozen
from moe_ray.models.expert_copies import experts_are_copies
from moe_ray.models.loading import load_model, load_tokenizer
from moe_ray.models.moe_layers import find_moe_layers
from moe_ray.storage.folder import Folder
from moe_ray.threads import threads_of_process


def quiet_and_threaded(num_processes: int) -> None:
    """Silences transformers, and gives torch this process's share of the node's cores.

    Ray would give it one thread per logical CPU that it asked for.

    Args:
        num_processes: how many processes share this node's cores.
    """
    transformers_logging.disable_progress_bar()
    transformers_logging.set_verbosity_error()
    torch.set_num_threads(threads_of_process(num_processes))


def process_device() -> torch.device:
    """The GPU that Ray gave to this process, else the CPU."""
    # Asked without a connection, Ray would start a cluster to answer.
    has_gpu = ray.is_initialized() and ray.get_gpu_ids() and torch.cuda.is_available()
    return torch.device("cuda" if has_gpu else "cpu")


class ModelHolder:
    """A process with the model and its tokenizer.

    Args:
        model: which one.
        num_processes: how many such processes share this node's cores.
        num_shards: over how many processes the model is sharded, see `load_model`; 0 = it is whole in this one.
    """

    def __init__(self, model: ModelConfig, num_processes: int, *, num_shards: int = 0) -> None:
        quiet_and_threaded(num_processes)
        self.tokenizer: PreTrainedTokenizerBase = load_tokenizer(model)
        # A process that got several GPUs got them because one is not enough.
        spread = "auto" if process_device().type == "cuda" and len(ray.get_gpu_ids()) > 1 else None
        self.model: PreTrainedModel = load_model(
            model, device=process_device(), device_map=spread, num_shards=num_shards
        )
        torch.set_num_threads(threads_of_process(num_processes, self.model.num_parameters()))

    @contextmanager
    def with_adapter(self, adapter: Folder | None) -> Iterator[None]:
        """Learned experts are in the model inside the context, and the base's own are back, bit for bit, after it.

        Args:
            adapter: their folder; None = the model stays the base model.
        """
        if adapter is None:
            yield
            return
        with local_adapter(adapter) as local, adapter_applied(self.model, local):
            yield

    def experts_are_copies(self) -> bool:
        """Whether no choice among the model's experts can make a difference, see `models.expert_copies`."""
        return experts_are_copies(self.model)


class BaseModel(ModelHolder):
    """A process with the base model, which trains one trial after another, each from the weights as they were loaded.

    Args:
        model: which one.
        num_processes: how many such processes share this node's cores.
    """

    def __init__(self, model: ModelConfig, num_processes: int) -> None:
        super().__init__(model, num_processes)
        self._hashes = self._hash()

    def check(self) -> None:
        """Checks that every parameter and buffer is bit for bit as it was loaded.

        Raises:
            RuntimeError: an earlier trial changed one.
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
