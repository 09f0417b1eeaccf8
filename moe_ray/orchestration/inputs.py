"""What can be refused before weights are loaded or Ray starts, and the model to use."""

from __future__ import annotations

import logging
from dataclasses import replace
from pathlib import Path

from moe_ray.config.compare import POLICY
from moe_ray.config.engines import check_engines
from moe_ray.config.fields import EMBEDDED
from moe_ray.config.model import ModelConfig
from moe_ray.config.quantisation import require_library
from moe_ray.config.run import Config
from moe_ray.errors import InputError
from moe_ray.evaluation.judge_check import measured_check
from moe_ray.evaluation.judges import check_judge
from moe_ray.harness.tasks import tasks_of
from moe_ray.organisms.recipe import OrganismRecipe, embedded_folder
from moe_ray.resources.model_size import ModelSize, size_of
from moe_ray.studies.search_space import read_space

logger = logging.getLogger(__name__)

WITHOUT_TRAINING = ("prepare", "capture", "identify", "ablate")
"""Workflows that end before anything is learned."""
_WITHOUT_MASKS = ("prepare", "capture")
_RULES_BY_THRESHOLD = ("risk_diff", "per_layer", "random")
"""Rules that keep experts above `identify.threshold`, by any weighting."""


def check_requests(config: Config) -> None:
    """Refuses an engine, a judge, a harness or a sweep that cannot work.

    Raises:
        InputError: an engine is not installed or cannot do what is asked for, the judge cannot be had, its check is of
            another one, or a task or the search space is wrong.
    """
    check_engines(config)
    check_judge(config.evaluate)
    if config.harness.run:
        tasks_of(config.harness)
    if config.evaluate.judge_check:
        measured_check(config.evaluate)
    if config.sweep.run:
        read_space(config)


def uses_masks(config: Config, workflow: str) -> bool:
    """Whether a workflow keeps tokens to some experts; where it does so only if it can, it is not said to."""
    routings = {config.finetune.routing}
    if config.sweep.run:
        routings |= set(read_space(config).choices.get("finetune.routing", ()))
    trains = workflow not in WITHOUT_TRAINING
    compared = config.compare.names or ("mask_only",)
    return (
        workflow == "ablate"
        or (trains and any(routing.startswith("masked") for routing in routings))
        or (trains and bool({"masked", "union"} & set(config.evaluate.routing)))
        or (workflow in ("full", "sweep", "compare") and config.ablate.run == "true")
        or (
            trains and config.compare.run and any(f"{POLICY}masked" in name or name == "mask_only" for name in compared)
        )
    )


def resolve_model(config: Config, *, trained: bool = False, masked: bool = False) -> ModelConfig:
    """The model to use: the configured one, or the embedded one, whether it is built yet or not.

    A local checkpoint's path comes back absolute, since workers run in folders of their own.

    Raises:
        InputError: the checkpoint does not exist, has no experts or its parts do not belong together, or it is to be
            `trained` and its experts cannot be, or not sharded as `finetune.shard` or `model.num_shards` says, or `masked`
            and its routers cannot be.
    """
    require_library(config.model.quantisation)
    if config.model.path == EMBEDDED:
        return replace(config.model, path=str(embedded_folder(cache_folder(config), seed=config.seed)))
    # Torch and the model library take seconds to import.
    from moe_ray.models.loading import check_maskable, check_model, check_shardable, check_tokenizer, check_trainable

    (check_trainable if trained else check_model)(config.model)
    if trained and config.finetune.shard != "none":
        check_shardable(config.model)
    if (shards := config.model.num_shards) > 1:
        check_shardable(config.model, asked=f"model.num_shards={shards}", otherwise="model.num_shards=1")
    if masked:
        check_maskable(config.model)
    check_tokenizer(config.model)
    folder = config.model.local_folder()
    # Every node fetches a model of a store for itself.
    if folder is None or config.model.is_url:
        return config.model
    return replace(config.model, path=str(folder.absolute()))


def check_threshold(config: Config, workflow: str) -> None:
    """Refuses a threshold that no expert of the model can be above, before anything is counted.

    Rates by router weight are up to the number of experts that a token is routed to; differences of other rates have bounds
    that every model has, which the configuration knows.

    Raises:
        InputError: `identify.threshold`, or one that the sweep shall try, is out of reach; or as `check_model`.
    """
    identify = config.identify
    if workflow in _WITHOUT_MASKS or identify.weighting != "activation" or identify.rule not in _RULES_BY_THRESHOLD:
        return
    asked = {"identify.threshold": [identify.threshold]}
    if config.sweep.run:
        asked["sweep.space: identify.threshold"] = list(read_space(config).choices.get("identify.threshold", ()))
    if max(max(values, default=0.0) for values in asked.values()) < 1:  # what every model reaches
        return
    reach = _experts_per_token(config)
    for name, values in asked.items():
        if beyond := [value for value in values if value >= reach]:
            raise InputError(
                f"{name}: expected below {reach}, since {config.model.path} routes a token to {reach} experts and no rate "
                f"by router weight is higher, got {beyond[0]:g}; lower it, or set identify.weighting=tokens for rates of "
                "at most 1"
            )


def _experts_per_token(config: Config) -> int:
    if config.model.path == EMBEDDED:
        return OrganismRecipe().num_experts_per_tok
    from moe_ray.models.loading import build_without_weights
    from moe_ray.models.moe_layers import find_moe_layers

    return find_moe_layers(build_without_weights(config.model)).num_experts_per_tok


def model_size(config: Config) -> ModelSize:
    """The numbers of the configured model; of the embedded one, which is not built yet, about.

    Raises:
        InputError: as `check_model`.
    """
    if config.model.path == EMBEDDED:
        return ModelSize(
            name=EMBEDDED, parameters=10**6, experts=72, expert_parameters=10**4, quantisation=config.model.quantisation
        )
    from moe_ray.models.loading import build_without_weights

    return size_of(build_without_weights(config.model), config.model)


def cache_folder(config: Config) -> Path:
    """Where the embedded model is kept."""
    return Path(config.cache_dir).expanduser().absolute()


def warn_of_embedded_prompts(config: Config) -> None:
    """Says so where a real model would be judged by the prompts of the demo."""
    if EMBEDDED in config.prompts.files and config.model.path != EMBEDDED:
        logger.warning(
            "prompts.files: %s runs on the prompts of the demo, which say little about a real model; name yours with "
            "prompts.files=[FILE]",
            config.model.path,
        )
