"""From the configuration to checked, split and grouped examples and to a model that has experts.

All that can be refused before weights are loaded or Ray starts is refused here.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from moe_ray.config.fields import EMBEDDED
from moe_ray.config.model import ModelConfig
from moe_ray.config.run import Config
from moe_ray.errors import InputError
from moe_ray.evaluation.judges import check_judge
from moe_ray.prompts.examples import read_examples
from moe_ray.prompts.prompt_set import Prompts, _embedded_examples, _group
from moe_ray.prompts.splits import check_both_labels
from moe_ray.studies.search_space import read_space


def read_prompts(config: Config) -> Prompts:
    """Reads, checks, splits and groups the examples; nothing is written and no model is loaded.

    Raises:
        InputError: files are missing or wrong, a label is missing in training or test, no batch can be filled.
    """
    settings = config.prompts
    files = [name for name in settings.files if name != EMBEDDED]
    examples = read_examples(files, paired_records=settings.paired_records) if files else []
    if EMBEDDED in settings.files:
        examples += _embedded_examples()
    check_both_labels(examples, "prompts")
    if settings.keep_pairs != "all" and not any(example.pair for example in examples):
        raise InputError("prompts.keep_pairs is on, but there is no goal + all_prompt record; set it to 'all'")
    check_judge(config.evaluate)
    _check_requests(config)
    return _group(examples, config)


def _check_requests(config: Config) -> None:
    """Refuses a sweep or baselines that the configuration does not allow.

    Raises:
        InputError: the search space is wrong, or a baseline needs routed weights that are not captured.
    """
    if config.sweep.run:
        read_space(config)
    if config.compare.run and "esft_gate" in config.compare.names and not config.capture.weights:
        raise InputError("compare.names: esft_gate needs routed weights; set capture.weights=true, or leave it out")


def resolve_model(
    config: Config, progress: Callable[[int, int, float], None] | None = None, *, trained: bool = False
) -> ModelConfig:
    """The model to use: the configured one, or the embedded one, built if it is not cached.

    A local checkpoint's path comes back absolute, since workers run in folders of their own.

    Raises:
        InputError: the checkpoint does not exist or has no experts, or is to be `trained` and its experts cannot be.
    """
    from moe_ray.models.loading import check_model

    if config.model.path != EMBEDDED:
        moe_layers = check_model(config.model)
        if trained:
            moe_layers[0].expert_tensors()
        folder = config.model.local_folder()
        return config.model if folder is None else replace(config.model, path=str(folder.absolute()))
    from moe_ray.demo.model import build_tiny_model

    path = build_tiny_model(Path(config.cache_dir).expanduser().absolute(), seed=config.seed, progress=progress)
    return replace(config.model, path=str(path))
