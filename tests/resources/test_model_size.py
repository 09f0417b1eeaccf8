"""How large a model is, known without its weights."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from families import HIDDEN, build

from moe_ray.config.finetune import FinetuneConfig
from moe_ray.config.model import ModelConfig
from moe_ray.config.run import Config
from moe_ray.models.loading import build_without_weights
from moe_ray.models.weight_files import bytes_in_memory
from moe_ray.resources.decide import decide
from moe_ray.resources.model_size import ModelSize, size_of
from moe_ray.resources.nodes import Node
from moe_ray.resources.training import training_bytes


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_numbers_are_those_of_the_checkpoint(dtype, tmp_path):
    build("olmoe", dtype=dtype).save_pretrained(tmp_path)
    config = ModelConfig(path=str(tmp_path))
    size = size_of(build_without_weights(config), config)
    own = str(dtype).removeprefix("torch.")
    assert (size.own_dtype, size.experts, size.layers) == (own, 16, 2)
    assert size.bytes_in(own) == bytes_in_memory(tmp_path)
    assert size.bytes_in("float32") == size.parameters * 4
    model = build("olmoe")
    experts = model.model.layers[0].mlp.experts
    assert size.expert_parameters == experts.gate_up_proj[0].numel() + experts.down_proj[0].numel()


def test_a_quantised_checkpoint_takes_what_its_files_hold():
    size = ModelSize(name="m", parameters=100, experts=4, expert_parameters=10, own_dtype="bfloat16", stored_bytes=120)
    assert (size.bytes_in("bfloat16"), size.bytes_in("float32")) == (120, 400)


@pytest.mark.parametrize(("method", "share"), [("int8", 1 + 4 / HIDDEN), ("4bit", 0.5 + 4 / 64)])
def test_quantised_experts_take_their_codes_and_two_layers_as_they_are_read(method, share, tmp_path):
    build("olmoe", dtype=torch.bfloat16).save_pretrained(tmp_path)
    config = ModelConfig(path=str(tmp_path), quantisation=method)
    size = size_of(build_without_weights(config), config)
    assert (size.quantisation, size.stored_as) == (method, None)
    many = replace(size, layers=10, experts=80)
    others = (many.parameters - 80 * many.expert_parameters) * 2
    of_two_layers = 16 * many.expert_parameters * 2
    assert many.bytes_in("bfloat16") == others + of_two_layers + math.ceil(80 * many.expert_parameters * share)


def test_30b_parameters_in_4_bits_fit_one_small_gpu_and_in_bfloat16_do_not():
    size = ModelSize(
        **{"name": "Qwen3-30B-A3B", "parameters": 30_532_122_624, "experts": 6144, "expert_parameters": 4_718_592},
        **{"layers": 48, "hidden": 2048, "vocabulary": 151_936, "own_dtype": "bfloat16"},
    )
    fits = {
        method: replace(size, quantisation=method).bytes_in("bfloat16") / 1e9 for method in ("none", "int8", "4bit")
    }
    assert fits == pytest.approx({"none": 61.1, "int8": 34.5, "4bit": 21.8}, abs=0.05)


@pytest.mark.parametrize(("dtype", "each"), [("float32", 16 + 2), ("model", 8 + 2)])
def test_what_is_learned_over_codes_lies_over_them_in_the_models_type_as_well(dtype, each):
    size = ModelSize(name="m", parameters=100, experts=4, expert_parameters=10, quantisation="int8")
    config = FinetuneConfig(dtype=dtype)
    assert training_bytes(size, 3, dtype="bfloat16", config=config) == 3 * 10 * each


@pytest.mark.parametrize(
    ("stored_as", "warned"), [("bitsandbytes", True), ("torchao", True), ("fp8", False), (None, False)]
)
def test_a_checkpoint_whose_quantisation_leaves_experts_alone_is_said_to(stored_as, warned):
    size = ModelSize(name="m", parameters=1000, experts=93, expert_parameters=10, stored_as=stored_as)
    said = " ".join(decide(Config(run_dir="runs/x"), size, [Node(cpus=4, memory=10**10)]).warnings)
    assert (f"quantised as {stored_as}, which leaves fused experts as they are: 93% of its numbers" in said) is warned
