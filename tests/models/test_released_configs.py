"""Configurations as released checkpoints have them give the layers, experts and k of the model cards, and can be routed."""

from __future__ import annotations

import logging
from collections.abc import Sequence

import numpy as np
import pytest
import torch
from families import rows, token_ids
from moe_families import FAMILIES, MASKED, REFUSED, UNMASKABLE, model_of
from released_configs import LAYERS, RELEASED
from removed_experts import masks_of, without_experts
from transformers import AutoConfig

from moe_ray.config.model import ModelConfig
from moe_ray.errors import InputError
from moe_ray.models.loading import build_without_weights
from moe_ray.models.moe_layers import find_moe_layers
from moe_ray.models.whole_numbers import from_pretrained
from moe_ray.routing.capture import count_rows
from moe_ray.routing.counter import counting
from moe_ray.routing.masking import route_through

pytestmark = pytest.mark.slow

NEMOTRON = [layer for layer, kind in enumerate("MEMEM*EMEMEM*EMEMEM*EMEMEM*EMEMEM*EMEMEMEM*EMEMEMEME") if kind == "E"]
CARDS: dict[str, tuple[Sequence[int], int, int, float | None]] = {
    "mistralai/Mixtral-8x7B-Instruct-v0.1": (range(32), 8, 2, 46.7),
    "allenai/OLMoE-1B-7B-0924": (range(16), 64, 8, 6.9),
    "Qwen/Qwen1.5-MoE-A2.7B-Chat": (range(24), 60, 4, 14.3),
    "Qwen/Qwen3-30B-A3B-Base": (range(48), 128, 8, 30.5),
    "Qwen/Qwen3-Next-80B-A3B-Instruct": (range(48), 512, 10, 80),
    "Qwen/Qwen3.5-35B-A3B": (range(40), 256, 8, 35),
    "deepseek-ai/DeepSeek-V2-Lite": (range(1, 27), 64, 6, 15.7),
    "deepseek-ai/DeepSeek-V3": (range(3, 61), 256, 8, 671),
    "deepseek-ai/DeepSeek-V3.2": (range(3, 61), 256, 8, 671),
    "deepseek-ai/DeepSeek-V4-Flash": (range(43), 256, 6, 284),
    "zai-org/GLM-4.7-FP8": (range(3, 92), 160, 8, 355),
    "zai-org/GLM-4.7-Flash": (range(1, 47), 64, 4, 30),
    "zai-org/GLM-5-FP8": (range(3, 78), 256, 8, 744),
    "openai/gpt-oss-20b": (range(24), 32, 4, 20.9),
    "microsoft/Phi-3.5-MoE-instruct": (range(32), 16, 2, 41.9),
    "tencent/Hunyuan-A13B-Instruct": (range(32), 64, 8, 80),
    "MiniMaxAI/MiniMax-M2": (range(62), 256, 8, 230),
    "ibm-granite/granite-3.1-1b-a400m-base": (range(24), 32, 8, 1.3),
    "ibm-granite/granite-4.0-h-small": (range(40), 72, 10, 32),
    "databricks/dbrx-instruct": (range(40), 16, 4, 132),
    "ai21labs/AI21-Jamba-1.5-Mini": (range(1, 32, 2), 16, 2, 52),
    "nvidia/NVIDIA-Nemotron-3-Nano-30B-A3B-BF16": (NEMOTRON, 128, 6, 31.6),
    "baidu/ERNIE-4.5-21B-A3B-PT": (range(1, 28), 64, 6, 21.8),
    "LiquidAI/LFM2-8B-A1B": (range(2, 24), 32, 4, 8.3),
    "moonshotai/Kimi-Linear-48B-A3B-Instruct": (range(1, 27), 256, 8, 48),
    "arcee-ai/Trinity-Nano-Preview": (range(2, 56), 128, 8, 6),
    "rednote-hilab/dots.llm1.inst": (range(1, 62), 128, 6, 142),
    "google/gemma-4-26B-A4B": (range(30), 128, 8, 26),
    # The source has no more than its first 4 layers.
    "LGAI-EXAONE/K-EXAONE-236B-A23B": (range(1, 4), 128, 8, None),
}
"""Decoder layers with experts, experts, experts per token, and parameters in billions, as their makers say."""

OF_REFUSED_FAMILIES = [name for name, released in RELEASED.items() if released.model_type in REFUSED]
ROWS = rows((7, 4), (3, 2), (5, 0))


@pytest.fixture(autouse=True)
def _quiet():
    logging.getLogger("transformers").setLevel(logging.ERROR)


def small_model(name, folder):
    released = RELEASED[name]
    return model_of(from_pretrained(AutoConfig, released.write_small(folder)))


def test_every_entry_is_of_a_known_family_says_where_it_was_found_and_is_checked():
    assert set(CARDS) | set(OF_REFUSED_FAMILIES) == set(RELEASED)
    assert not set(CARDS) & set(OF_REFUSED_FAMILIES)
    assert all(released.source and released.model_type in FAMILIES for released in RELEASED.values())
    assert len({released.model_type for released in RELEASED.values()}) == len(RELEASED) >= 31


@pytest.mark.parametrize("name", CARDS)
def test_a_published_configuration_gives_the_layers_experts_and_k_of_the_model_card(name, tmp_path):
    expected, num_experts, num_experts_per_tok, billions = CARDS[name]
    model = build_without_weights(ModelConfig(path=RELEASED[name].write(tmp_path)))
    found = find_moe_layers(model)
    assert found.layers == tuple(expected)
    assert (found.num_experts, found.num_experts_per_tok) == (num_experts, num_experts_per_tok)
    assert {layer.num_experts_per_tok for layer in found} == {num_experts_per_tok}
    # A field that is read as another, or not at all, shows in the size.
    size = sum(parameter.numel() for parameter in model.parameters()) / 1e9
    assert billions is None or size == pytest.approx(billions, rel=0.04)


@pytest.mark.parametrize("name", CARDS)
def test_a_small_model_in_the_published_form_is_counted_token_by_token(name, tmp_path):
    model = small_model(name, tmp_path)
    layers = find_moe_layers(model)
    assert layers.layers == tuple(layer for layer in CARDS[name][0] if layer < LAYERS)
    assert (layers.num_experts, layers.num_experts_per_tok) == (8, 2)
    with counting(model) as counter:
        counts_RPLE = count_rows(model, counter, ROWS, pad_id=0)[0]
    tokens = np.array([[len(row.prompt_ids), len(row.answer_ids), 0] for row in ROWS])
    assert (counts_RPLE.sum(axis=3) == tokens[:, :, None] * 2).all()


@pytest.mark.parametrize("name", CARDS)
def test_a_small_model_in_the_published_form_is_masked_as_if_the_other_experts_were_not_there(name, tmp_path):
    model, ids = small_model(name, tmp_path), token_ids(3, 11)
    masks = masks_of(find_moe_layers(model))
    if (family := RELEASED[name].model_type) in UNMASKABLE:
        with pytest.raises(InputError, match=UNMASKABLE[family]), route_through(model, masks["half"]):
            raise AssertionError("entered")
        return
    assert family in MASKED
    for mask_LE in (masks["half"], masks["most"]):
        with torch.no_grad():
            expected = without_experts(model, mask_LE)(ids).logits
            with route_through(model, mask_LE):
                torch.testing.assert_close(model(ids).logits, expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("name", OF_REFUSED_FAMILIES)
def test_a_released_checkpoint_of_a_family_that_does_not_fit_is_refused_with_the_reason(name, tmp_path):
    released = RELEASED[name]
    with pytest.raises(InputError) as refused:
        find_moe_layers(build_without_weights(ModelConfig(path=released.write(tmp_path))))
    assert REFUSED[released.model_type] in str(refused.value)
