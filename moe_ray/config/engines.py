"""What an engine other than transformers cannot do, refused by name before any work."""

from __future__ import annotations

from importlib.util import find_spec

from moe_ray.config.run import Config
from moe_ray.config.scores import needed_scores, needs_weights
from moe_ray.errors import InputError


def check_engines(config: Config) -> None:
    """Refuses an engine that is not installed here, or that cannot do what is asked for.

    Raises:
        InputError: one of the two.
    """
    chosen = {"capture": config.capture.engine, "evaluate": config.evaluate.engine}
    for section in (name for name, engine in chosen.items() if engine == "vllm"):
        if find_spec("vllm") is None:
            raise InputError(
                f"{section}.engine=vllm: vLLM is not installed; run pip install 'moe-ray[vllm]', on every node of a "
                f"cluster, or set {section}.engine=transformers"
            )
        if config.model.quantisation != "none":
            raise InputError(
                f"{section}.engine=vllm: model.quantisation={config.model.quantisation} is of experts that moe-ray loads "
                f"itself, and vLLM would run others; set model.quantisation=none, or {section}.engine=transformers"
            )
    if config.capture.engine == "vllm":
        _check_capture(config)
    others = sorted(set(config.evaluate.routing) - {"natural"})
    if config.evaluate.engine == "vllm" and others:
        raise InputError(
            f"evaluate.engine=vllm: {others[0]} routing restricts routers while they run, which vLLM has no way to; set "
            "evaluate.routing=[natural], or evaluate.engine=transformers"
        )


def _check_capture(config: Config) -> None:
    if scores := needed_scores(config):
        raise InputError(
            f"capture.engine=vllm: {', '.join(scores)} is measured by backward passes or by each expert's output, and vLLM "
            "gives routes only; take an identify.rule, compare.names and capture.scores that need none, or set "
            "capture.engine=transformers"
        )
    if needs_weights(config):
        raise InputError(
            "capture.engine=vllm: router weights are asked for (by identify.weighting=activation, identify.rule, "
            "compare.names or capture.weights), and vLLM gives routes only; set identify.weighting=tokens, or "
            "capture.engine=transformers"
        )
