"""Every causal family with experts that the installed transformers has, each as a tiny random model.

The families are found in the library's own files, and their configurations are made small by the names of their settings.
`_SETTINGS` says only what a family needs beyond that to be built small.
"""

from __future__ import annotations

import copy
import functools
import json
import logging
import re
from pathlib import Path
from typing import Any

import torch
import transformers
from paths import TESTS
from torch import nn
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, PretrainedConfig, PreTrainedModel
from transformers.models.auto.configuration_auto import model_type_to_module_name
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

VOCAB, LAYERS, EXPERTS = 64, 4, 8

_EXPERTS_CLASS = re.compile(r"^class \w*(?:Experts?|Router|MoE|MoA|Moe(?!del))\b", re.MULTILINE)


def causal_moe_families() -> tuple[str, ...]:
    """Model types of causal language models whose modelling files define experts or routers."""
    folder = Path(transformers.__file__).parent / "models"
    sources = {
        model_type: "".join(
            file.read_text() for file in (folder / model_type_to_module_name(model_type)).glob("modeling_*.py")
        )
        for model_type in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
    }
    return tuple(sorted(name for name, source in sources.items() if _EXPERTS_CLASS.search(source)))


_SIZES: dict[str, int] = {
    r"vocab_size(_per_layer_input)?": VOCAB,
    r"hidden_size|d_model": 32,
    r"num_hidden_layers|n_layers|num_layers": LAYERS,
    r"(\w+_)?n_heads|(\w+_)?num(_\w+)?_heads": 4,
    r"(\w+_)?head_dim|kv_channels|d_head": 8,
    r"(\w*_)?intermediate_size|(expert_)?ffn_hidden_size": 16,
    r"num_experts|num_local_experts|n_routed_experts|moe_num_experts": EXPERTS,
    r"num_experts_per_tok(en)?|moe_topk|moe_top_k|moe_k|top_k_experts": 2,
    r"\w+_lora_rank|hidden_size_per_layer_input": 8,
    r"router_hidden_size": 12,
    r"max_position_embeddings|max_seq_len": 128,
    r"n_group|num_expert_groups?": 2,
    r"topk_group": 1,
    r"first_k_dense_replace": 1,
    r"pad_token_id": 0,
    r"bos_token_id": 1,
    r"eos_token_id": 2,
}
"""Small values of settings, by a pattern of their names."""

_HYBRID = {"layer_types": ["linear_attention", "full_attention"] * 2}
_GEMMA4 = {"enable_moe_block": True, "vocab_size_per_layer_input": VOCAB}
_MLA = {
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "q_lora_rank": 8,
    "kv_lora_rank": 8,
    "head_dim": 16,
    "qk_nope_head_dim": 8,
    "v_head_dim": 8,
}
_DOTS3 = {f"swa_{name}": size for name, size in _MLA.items()} | {
    "head_dim": 16,
    "layer_types": ["indexed_attention", "sliding_attention"] * 2,
}
_QWEN4 = {
    "full_attention_interval": 2,
    "indexer_kv_heads": 1,
    "indexer_budget": 8,
    "indexer_compress_ratio": 4,
    "hc_lowrank": 4,
}
_SETTINGS: dict[str, dict[str, Any]] = {
    "bailing_hybrid": _HYBRID,
    "dbrx": {"attn_config": {"rope_theta": 1e4, "clip_qkv": 8}, "ffn_config": {"moe_normalize_expert_weights": 1.0}},
    "doge": {"is_moe": True},
    "dots1": {"n_shared_experts": 1},
    "dots3_note": {
        "text_config": _DOTS3,
        "vision_config": {"pyramid_num_routed": [-1, -1, 4, 4], "adapter_in_dim": 32, "adapter_out_dim": 32},
        "audio_config": {"adapter_input_size": 32, "adapter_out_dim": 32},
    },
    "dots3_note_text": _DOTS3,
    "gemma4": {"text_config": _GEMMA4},
    "gemma4_text": _GEMMA4,
    "granitemoehybrid": _HYBRID | {"mamba_n_heads": 8, "mamba_d_state": 8, "shared_intermediate_size": 16},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1, "mamba_d_state": 4, "mamba_dt_rank": 4},
    "kimi_linear": _HYBRID,
    "lfm2_moe": {"layer_types": ["conv", "full_attention"] * 2},
    "longcat_flash": {"qk_head_dim": 16, "zero_expert_num": 4},
    "mimo_v2_flash": {"num_key_value_heads": 2},
    "nemotron_h": {"mamba_num_heads": 8, "mamba_head_dim": 8, "n_groups": 2, "ssm_state_size": 8},
    "qwen4_exp": {"text_config": _QWEN4},
    "qwen4_exp_text": _QWEN4,
    "zaya": {"num_experts_per_tok": 1},
}


def small_config(config_class: type[PretrainedConfig], **settings: Any) -> PretrainedConfig:
    """The class's default configuration with every size small, and `settings`."""
    default = config_class()
    small: dict[str, Any] = {}
    for name, value in default.to_dict().items():
        size = small_size(name)
        if name in default.sub_configs and value is not None:
            small[name] = small_config(type(getattr(default, name)), **settings.pop(name, {})).to_dict()
        elif size is not None and (value is None or (type(value) is int and (value or name.endswith("token_id")))):
            small[name] = size
    return config_class(**small | settings)


def small_size(name: str) -> int | None:
    """The small value of the setting of this name; None = it is no size, or not one that has to be small."""
    fitting = [size for pattern, size in _SIZES.items() if re.fullmatch(pattern, name)]
    return fitting[-1] if fitting else None


_SINGLE = ("inkling2_text",)
"""Families that mix float32 into their forward, so cannot be run in double precision."""


@functools.cache
def tiny_model(family: str, **settings: Any) -> PreTrainedModel:
    """The family's tiny model in eval mode, in double precision where it can be, with large random weights."""
    config = small_config(CONFIG_MAPPING[family], **copy.deepcopy(_SETTINGS.get(family, {}) | settings))
    return model_of(config, torch.float32 if family in _SINGLE else torch.float64)


def model_of(config: PretrainedConfig, dtype: torch.dtype = torch.float64) -> PreTrainedModel:
    """The tiny model of a configuration in eval mode, with large random weights."""
    logging.getLogger("transformers").setLevel(logging.ERROR)
    torch.manual_seed(0)
    with torch.device("meta"):
        size = sum(parameter.numel() for parameter in AutoModelForCausalLM.from_config(config).parameters())
    assert size < 1_000_000, (
        f"{config.model_type}: {size} parameters are not tiny; add its sizes to _SIZES or _SETTINGS"
    )
    model = AutoModelForCausalLM.from_config(config, experts_implementation="eager")
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() > 1 and not re.search("A_log|conv", name):
                nn.init.normal_(parameter, std=1.0 if re.search("gate|router", name) else 0.2)
        for name, buffer in model.named_buffers():
            if re.search("correction_bias|expert_bias|balancing_bias", name):
                nn.init.normal_(buffer, std=0.4)
            elif not buffer.is_floating_point() and buffer.shape[:1] == (VOCAB,):
                # A table of experts by token id: every token its own, none of them twice.
                buffer.copy_(torch.rand(VOCAB, EXPERTS).argsort(dim=1)[:, : buffer.shape[1]])
    return model.to(dtype).eval()


REFUSED = {
    # Product keys: a layer has thousands of one-neuron experts and neither experts module nor router module.
    "doge": "is a DogeCDMoE of another kind",
    # Experts receive tokens sorted by expert, and the attention has experts of its own.
    "jetmoe": "is a JetMoeMoE of another kind",
    # Every expert computes every token, scaled by a score that is 0 where it is not chosen; no ids are passed.
    "llama4": "is a Llama4TextMoe of another kind",
    "llama4_text": "is a Llama4TextMoe of another kind",
    # Some ids are of experts that compute nothing, so a token has from 0 to K experts with weights.
    "longcat_flash": "is a LongcatFlashMoE of another kind",
    # The router may choose to skip the layer; the experts then receive id 0 with weight 0, which is not what was routed.
    "zaya": "expected exactly one module with a (8, hidden) weight",
}
"""Families without counts: why, and what the user is told."""

UNMASKABLE = {
    # Its first layers choose by a table of experts per token id, which no logit reaches.
    "deepseek_v4": "its router takes experts from a table by token id",
    # Experts of groups that were not chosen are scored 0, and a lowered score is below that. (Without groups it can be.)
    "axk2": "its router gives experts of groups that it has not chosen a score of 0",
}
"""Families that are counted, and cannot be masked: why, and what the user is told."""

UNTRAINABLE = {
    # Its experts stand below one another in matrices, (experts * ffn, hidden).
    "dbrx": "has no tensors with one slice per expert",
}
"""Families that are counted and masked, and cannot be trained: why, and what the user is told."""

FAMILIES = causal_moe_families()
COUNTED = tuple(family for family in FAMILIES if family not in REFUSED)
MASKED = tuple(family for family in COUNTED if family not in UNMASKABLE)
TRAINED = tuple(family for family in COUNTED if family not in UNTRAINABLE)
TRAINED_MASKED = tuple(family for family in MASKED if family not in UNTRAINABLE)


def page() -> str:
    """`docs/families.md`: what the tests of all families check, family by family."""
    entries = json.loads((TESTS / "released_configs.json").read_text())
    released = {entry["fields"]["model_type"]: name for name, entry in entries.items()}
    lines = [
        "# Model families",
        "",
        "<!-- Written by `python tests/moe_families.py > docs/families.md` from the lists that the tests go through. -->",
        "",
        f"The tests find {len(FAMILIES)} causal model types with experts in transformers {transformers.__version__}, build "
        "each as a tiny random model, and check that",
        "",
        "- *counted*: counts are of what the experts received, for each token and whatever the padding, and change no logit "
        "(`tests/routing/test_all_families.py`);",
        "- *masked*: the output under a mask is that of the model from which the other experts were cut out, for one mask "
        "and for one mask per row (the same file);",
        "- *trained*: the gradient of the batch's experts, under natural routing, is that of the plain model, and nothing "
        "else moves; *trained, masked*: it is that of the model without the other experts "
        "(`tests/finetuning/test_all_families.py`);",
        "- *released form*: built from `config.json` as this released checkpoint has it, the family has the layers with "
        "experts, the experts and the k that its model card names, and with small sizes it is counted and masked as above; "
        "for one that is not counted, it is refused in that form too (`tests/models/test_released_configs.py`; "
        "`tests/released_configs.json` says where each was found). Empty: no published form was found, and none is checked.",
        "",
        f"Counted: {len(COUNTED)}. Masked: {len(MASKED)}. Trained: {len(TRAINED)}. "
        f"Trained under a mask: {len(TRAINED_MASKED)}. Released form checked: {len(released)}.",
        "",
        "| model type | counted | masked | trained | trained, masked | released form | what is refused says |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for family in FAMILIES:
        marks = ["yes" if family in families else "no" for families in (COUNTED, MASKED, TRAINED, TRAINED_MASKED)]
        why = REFUSED.get(family) or UNMASKABLE.get(family) or UNTRAINABLE.get(family) or ""
        lines.append(f"| `{family}` | {' | '.join(marks)} | {released.get(family, '')} | {why} |")
    return "\n".join(lines)


if __name__ == "__main__":
    print(page())
