"""Loading a model with its tokenizer, on the device and in the type that suit it."""

from __future__ import annotations

import math
import re
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase
from transformers.distributed import DistributedConfig
from transformers.utils import is_accelerate_available

from moe_ray.config.model import ModelConfig
from moe_ray.config.quantisation import require_library
from moe_ray.errors import InputError
from moe_ray.models.chat_template import with_options
from moe_ray.models.checkpoint_check import check_shapes
from moe_ray.models.moe_layers import MoELayers, find_moe_layers
from moe_ray.models.quantised_loading import ExpertQuantisation, fused_tensors
from moe_ray.models.sharded_storage import check_sharded
from moe_ray.models.unmaskable import refuse_unmaskable
from moe_ray.models.whole_numbers import from_pretrained, reason_of

_EXPERT_CODES = ("fp8", "mxfp4")
"""Quantisations of checkpoints that reach experts."""


def check_model(config: ModelConfig) -> MoELayers:
    """The MoE layers of a checkpoint, found without loading its weights.

    Raises:
        InputError: the checkpoint does not exist, cannot be read, or has no experts, or none that can be quantised as asked;
            or a local one's weights are missing, damaged, pickles or of other shapes than its configuration says; or its
            chat template does not know an option.
    """
    model = build_without_weights(config)
    layers = find_moe_layers(model)
    if (folder := config.local_folder()) is not None:
        check_shapes(model, folder)
    if config.quantisation != "none":
        _check_quantisable(config, model)
    if config.chat_template_options:
        load_tokenizer(config)
    return layers


def _check_quantisable(config: ModelConfig, model: PreTrainedModel) -> None:
    require_library(config.quantisation)
    if (method := stored_quantisation(model.config)) is not None:
        raise InputError(
            f"model.quantisation={config.quantisation}: got a checkpoint that is quantised as {method} already, expected "
            "weights in bfloat16, float16 or float32; set model.quantisation=none, or give the checkpoint before its "
            "quantisation"
        )
    fused_tensors(model)


def stored_quantisation(architecture: Any) -> str | None:
    """How a checkpoint with this configuration is quantised; None = it is not."""
    stored = getattr(architecture, "quantization_config", None) or {}
    method = stored.get("quant_method") if isinstance(stored, dict) else stored.quant_method
    return str(getattr(method, "value", method)) if method else None


def build_without_weights(config: ModelConfig) -> PreTrainedModel:
    """The model that a checkpoint's configuration describes, on the meta device.

    Raises:
        InputError: the checkpoint does not exist, or its configuration cannot be read or describes no language model.
    """
    architecture = _load_or_explain(AutoConfig, config)
    with torch.device("meta"):
        try:
            model: PreTrainedModel = AutoModelForCausalLM.from_config(
                architecture, trust_remote_code=config.trust_remote_code
            )
        except (ValueError, TypeError, RuntimeError) as error:
            raise InputError(
                f"model.path {config.path!r}: its configuration gives no causal language model: {reason_of(error)}; give "
                "a checkpoint folder or a hub name"
            ) from error
    return model


def check_trainable(config: ModelConfig) -> None:
    """Refuses a checkpoint whose experts cannot be trained, without loading its weights.

    Raises:
        InputError: as `check_model`; or its experts are of a form that cannot be trained, or quantised.
    """
    check_model(config)[0].expert_tensors()
    method = stored_quantisation(_load_or_explain(AutoConfig, config))
    # Other methods leave fused experts as they are; what is left is seen then. The library undoes MXFP4 where it has no
    # kernels for it: the same run would be refused on one machine and not on another.
    if method is not None and method.lower() in _EXPERT_CODES:
        raise InputError(
            f"model.path {config.path!r}: got a checkpoint quantised as {method}, whose experts are codes with scales and "
            "cannot be trained, expected weights in bfloat16, float16 or float32; give the checkpoint before its "
            "quantisation"
        )


def check_shardable(
    config: ModelConfig, *, asked: str = "finetune.shard=fsdp", otherwise: str = "finetune.shard=none"
) -> None:
    """Refuses a checkpoint that FSDP2 cannot spread over processes, without loading its weights.

    Args:
        config: which one.
        asked: the setting that asks for it.
        otherwise: the one that does not.

    Raises:
        InputError: as `check_model`; or its experts are modules of their own, the checkpoint is quantised, or transformers'
            plan to shard the family names modules that it has not.
    """
    model = build_without_weights(config)

    def refused(what: str) -> InputError:
        return InputError(f"{asked}: model.path {config.path!r} {what}; set {otherwise}")

    if (method := stored_quantisation(model.config)) is not None:
        raise refused(f"is quantised as {method}, and codes are not sharded")
    if any(layer.expert_modules() for layer in find_moe_layers(model)):
        raise refused("keeps every expert as a module of its own, and only fused experts are sharded")
    there = {re.sub(r"\.\d+(?=\.|$)", ".*", name) for name, _ in model.named_modules()}
    if missing := sorted(name for name in model.fsdp_plan if name not in there):
        raise refused(f"is a {type(model).__name__} without {missing[0]}, which transformers' plan to shard it names")


def check_tokenizer(config: ModelConfig) -> None:
    """Refuses a checkpoint whose tokenizer has token ids that the model has no embedding for.

    Raises:
        InputError: it has, or there is no tokenizer.
    """
    largest = max(load_tokenizer(config).get_vocab().values(), default=-1)
    size = _load_or_explain(AutoConfig, config).get_text_config().vocab_size
    if largest >= size:
        raise InputError(
            f"model.path {config.path!r}: the tokenizer has token ids up to {largest}, but the model has embeddings for "
            f"{size} tokens; give a checkpoint with its own tokenizer, or resize its embeddings"
        )


def check_maskable(config: ModelConfig) -> None:
    """Refuses a checkpoint whose routers no mask can restrict, without loading its weights.

    Raises:
        InputError: as `check_model`; or a router is known to be of that kind.
    """
    refuse_unmaskable(check_model(config))


def load_model(
    config: ModelConfig,
    *,
    device: str | torch.device | None = None,
    device_map: str | dict[str, Any] | None = None,
    num_shards: int = 0,
) -> PreTrainedModel:
    """The model in eval mode.

    Args:
        config: `dtype: auto` gives float32 on CPU and the checkpoint's own type on GPU; a run has decided before, once for
            all of its processes, see `moe_ray.resources.decide`. `experts_implementation: auto` gives eager on CPU, where it
            is the fastest, the library's default on GPU.
        device: None = the first GPU if there is one, else CPU.
        device_map: spreads the model over devices, see accelerate; "auto" = over all GPUs of this process.
        num_shards: FSDP2 spreads every tensor over this many processes, those of `torch.distributed`'s default group, each
            of which reads its own part only; 0 = the model is whole in this one. Excludes `device_map`.

    Raises:
        InputError: the checkpoint does not exist or cannot be read, or its weights are not those of the model that its
            configuration describes; or it cannot be sharded.
    """
    if config.quantisation != "none":
        require_library(config.quantisation)
    target = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    on_cpu = target.type == "cpu"
    dtype: Any = ("float32" if on_cpu else "auto") if config.dtype == "auto" else config.dtype
    options: dict[str, Any] = {"dtype": dtype}
    if config.quantisation != "none":
        options["quantization_config"] = ExpertQuantisation(config.quantisation)
    implementation = config.experts_implementation
    if implementation != "auto" or on_cpu:
        options["experts_implementation"] = "eager" if implementation == "auto" else implementation
    if num_shards:
        spread: PreTrainedModel = _load_all_weights(
            config, distributed_config=DistributedConfig(fsdp_size=num_shards), **options
        ).eval()
        check_sharded(spread)
        return spread
    if device_map is None and not on_cpu and is_accelerate_available():
        # Every tensor goes there as it is read; a model that is loaded and then moved is whole in the host's memory first.
        device_map = {"": torch.device(target.type, target.index or 0)}
    if device_map is not None:
        return _load_all_weights(config, device_map=device_map, **options).eval()
    loaded: PreTrainedModel = _load_all_weights(config, **options).to(target)
    return loaded.eval()


def _load_all_weights(config: ModelConfig, **options: Any) -> Any:
    """The model, if the checkpoint holds each of its weights and nothing else: others would be random, or left out."""
    model, found = _load_or_explain(
        AutoModelForCausalLM,
        config,
        output_loading_info=True,
        ignore_mismatched_sizes=True,  # they are refused below, all kinds of faults in one sentence
        use_safetensors=True,
        **options,
    )
    wrong_shapes = [
        f"{name} is {tuple(got)} instead of {tuple(wanted)}" for name, got, wanted in found["mismatched_keys"]
    ]
    faults = {
        "missing": sorted(found["missing_keys"]),
        "of another shape": sorted(wrong_shapes),
        "unknown to the model": sorted(found["unexpected_keys"]),
    }
    if any(faults.values()):
        words = "; ".join(f"{len(names)} {what}, such as {names[0]}" for what, names in faults.items() if names)
        raise InputError(
            f"model.path {config.path!r}: its weights are not those of a {type(model).__name__} with this configuration: "
            f"{words}; copy or download the checkpoint again, and check that config.json belongs to it"
        )
    return model


def load_tokenizer(config: ModelConfig) -> PreTrainedTokenizerBase:
    """The model's tokenizer, whose chat template has the options of the configuration.

    Raises:
        InputError: the checkpoint does not exist or has no tokenizer, or its chat template does not know an option.
    """
    return with_options(_load_or_explain(AutoTokenizer, config), config.chat_template_options)


def _load_or_explain(kind: Any, config: ModelConfig, **options: Any) -> Any:
    path = str(config.local_folder() or config.path)
    try:
        return from_pretrained(
            kind, path, revision=config.revision, trust_remote_code=config.trust_remote_code, **options
        )
    except Exception as error:
        # Whatever the libraries stumble over in a configuration or a tokenizer, the file is at fault, and some raise no more
        # than Exception; but memory that runs out while weights are loaded is no fault of theirs.
        if isinstance(error, (RuntimeError, MemoryError)) and kind is AutoModelForCausalLM:
            raise
        raise InputError(
            f"model.path {config.path!r} cannot be loaded: {reason_of(error)}; give a checkpoint folder or a hub name"
        ) from error


def context_length(model: ModelConfig | PreTrainedModel) -> int | None:
    """The most tokens that a checkpoint or a loaded model takes in one row; None = not said."""
    architecture = model.config if isinstance(model, PreTrainedModel) else _load_or_explain(AutoConfig, model)
    longest = getattr(architecture.get_text_config(), "max_position_embeddings", None)
    return int(longest) if isinstance(longest, int) and longest > 0 else None


def uniform_loss(config: ModelConfig) -> float:
    """Nats per token of a guess that takes every token of the vocabulary for equally likely.

    Raises:
        InputError: as `check_model`.
    """
    return math.log(_load_or_explain(AutoConfig, config).get_text_config().vocab_size)


def num_decoder_layers(config: ModelConfig) -> int:
    """Decoder layers of a checkpoint, dense ones included."""
    return int(_load_or_explain(AutoConfig, config).get_text_config().num_hidden_layers)
