"""A process that holds vLLM's engine in the place of a transformers model, and pools of such processes."""

from __future__ import annotations

import os
import tempfile
from functools import partial
from pathlib import Path

from filelock import FileLock
from transformers import GenerationConfig, PreTrainedModel

from moe_ray.config.model import ModelConfig
from moe_ray.finetuning.adapter_files import local_adapter
from moe_ray.finetuning.merge import write_repaired
from moe_ray.models.end_tokens import end_ids
from moe_ray.models.generation import Response, response_of
from moe_ray.models.loading import build_without_weights, load_tokenizer
from moe_ray.models.moe_layers import find_moe_layers
from moe_ray.models.vllm_engine import VllmEngine
from moe_ray.orchestration.cluster.model_pool import ModelPool
from moe_ray.orchestration.cluster.model_process import ModelHolder, quiet_and_threaded
from moe_ray.routing.engine_routes import RoutedModel, Routes, read_routes
from moe_ray.storage.folder import Folder


class EngineHolder(ModelHolder):
    """A process with an engine; its `model` has no weights and says what the configuration says.

    Args:
        model: which one.
        num_processes: how many such processes share this node's cores.
        gpus: of this process.
        adapter_url: folder of learned experts, which are merged into a checkpoint for the engine; empty = the base model.
        returns_routes: routes are recorded.
    """

    def __init__(
        self,
        model: ModelConfig,
        num_processes: int,
        *,
        gpus: float = 0.0,
        adapter_url: str = "",
        returns_routes: bool = False,
    ) -> None:
        quiet_and_threaded(num_processes)
        self.tokenizer = load_tokenizer(model)
        self.model: PreTrainedModel = build_without_weights(model)
        self.model.generation_config = _generation_config(model, self.model)
        self.moe_layers = find_moe_layers(self.model)
        self.routed = RoutedModel.of(self.moe_layers, int(self.model.config.get_text_config().num_hidden_layers))
        if not adapter_url:
            self.engine = VllmEngine(model, gpus=gpus, returns_routes=returns_routes)
            return
        # A merged checkpoint is as large as the model: one at a time lies on a node's disk, until its engine has read it.
        with (
            FileLock(Path(tempfile.gettempdir(), f"moe-ray-merged-{os.getuid()}.lock")),
            tempfile.TemporaryDirectory(prefix="moe-ray-merged-") as merged,
            local_adapter(Folder.open(adapter_url)) as adapter,
        ):
            write_repaired(model, adapter, Path(merged))
            self.engine = VllmEngine(model, path=Path(merged), gpus=gpus, returns_routes=returns_routes)

    def respond(
        self, prompts: list[list[int]], *, max_new_tokens: int, temperature: float = 0.0, seeds: list[int] | None = None
    ) -> list[Response]:
        """Responses to token ids, as `generate_responses` gives them; drawn ones with vLLM's random numbers."""
        ends = set(end_ids(self.model, self.tokenizer))
        generated = self.engine.generate(
            prompts, max_new_tokens=max_new_tokens, ends=ends, temperature=temperature, seeds=seeds or ()
        )
        return [response_of(self.tokenizer, prompt, ids, ends) for prompt, ids in zip(prompts, generated, strict=True)]

    def routes(self, texts: list[list[int]]) -> list[Routes]:
        """The routes of given tokens, checked."""
        return [
            read_routes(routes, self.routed, num_prompt_tokens=len(text))
            for text, routes in zip(texts, self.engine.routes(texts), strict=True)
        ]


def _generation_config(config: ModelConfig, model: PreTrainedModel) -> GenerationConfig:
    """As a model that is loaded has it: of a file of its own, else of the model's configuration."""
    path = str(config.local_folder() or config.path)
    try:
        return GenerationConfig.from_pretrained(path, revision=config.revision)
    except OSError:
        return model.generation_config


def engine_pool(
    model: ModelConfig,
    beside: ModelPool | None,
    *,
    gpus: float,
    adapter: Folder | None = None,
    returns_routes: bool = False,
) -> ModelPool:
    """A pool whose processes hold an engine each.

    Args:
        model: which one.
        beside: the run's own processes, which give way: one of either kind takes all the memory that is there. Engines ask
            for as much, on the same nodes. None = there are none.
        gpus: of each process.
        adapter: folder of learned experts; None = the base model.
        returns_routes: routes are recorded.
    """
    adapter_url = "" if adapter is None else adapter.url
    load = partial(EngineHolder, gpus=gpus, adapter_url=adapter_url, returns_routes=returns_routes)
    if beside is None:
        return ModelPool(model, load=load)
    beside.release()
    return ModelPool(model, memory=beside.memory, placement=beside.placement, load=load)
