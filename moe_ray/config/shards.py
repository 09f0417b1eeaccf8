"""What a model that is spread over processes cannot do, refused by name before any work."""

from __future__ import annotations

from collections.abc import Iterator

from moe_ray.config.auto import gpus_of
from moe_ray.config.run import Config
from moe_ray.config.scores import needed_scores
from moe_ray.errors import InputError

_BY_BACKWARD_PASSES = ("attribution", "gate")
"""Scores that are gradients."""

_CHANGE_WEIGHTS = ("abliteration", "benign_finetuning")
"""Attacks that do."""


def check_shards(config: Config, *, trains: bool) -> None:
    """Refuses settings that `model.num_shards` cannot go with.

    Args:
        config: the settings.
        trains: experts are learned.

    Raises:
        InputError: the first of them.
    """
    if config.model.num_shards == 1:
        return
    for why, cure in _faults(config, trains):
        raise InputError(
            f"model.num_shards={config.model.num_shards}: {why}; set {cure}, or model.num_shards=1 where a process has room "
            "for the whole model"
        )


def _faults(config: Config, trains: bool) -> Iterator[tuple[str, str]]:
    """Yields what cannot be, and what to set instead."""
    if config.model.quantisation != "none":
        yield (
            f"model.quantisation={config.model.quantisation} keeps experts as codes, which are not sharded",
            ("model.quantisation=none"),
        )
    for name, engine in (("capture", config.capture.engine), ("evaluate", config.evaluate.engine)):
        if engine != "transformers":
            yield (
                f"{name}.engine={engine} spreads the model over the GPUs of a process itself",
                f"{name}.engine=transformers",
            )
    for section in (config.capture, config.evaluate, config.ablate):
        if gpus_of(section.gpus_per_actor) > 1:
            yield (
                f"got {section.group}.gpus_per_actor={section.gpus_per_actor:g}, expected at most 1: a process's part is on "
                "one GPU",
                f"{section.group}.gpus_per_actor=1",
            )
    if scores := [score for score in needed_scores(config) if score in _BY_BACKWARD_PASSES]:
        yield (
            f"{scores[0]} is measured by backward passes, and the processes join forward passes only",
            ("an identify.rule and capture.scores that need none"),
        )
    if trains and config.finetune.shard == "none":
        yield (
            "finetune.shard=none trains with the whole model in each worker",
            ("finetune.shard=fsdp and finetune.num_workers of 2 or more"),
        )
    for name, is_run in (("sweep", config.sweep.run), ("compare", config.compare.run)):
        if is_run:
            yield f"{name}.run=true trains with the whole model in one process", f"{name}.run=false"
    if config.attack.run:
        names = config.attack.names or _CHANGE_WEIGHTS
        if wrong := [name for name in names if name in _CHANGE_WEIGHTS]:
            yield (
                f"{wrong[0]} in attack.names changes weights all over the model",
                (f"attack.names without {' and '.join(_CHANGE_WEIGHTS)}"),
            )
