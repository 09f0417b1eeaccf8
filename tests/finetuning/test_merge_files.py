"""Files are merged as a loaded model would be, number by number, in memory that does not grow with the checkpoint."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
import torch
from families import SOME_FAMILIES, build, state_of
from paths import ROOT
from safetensors import safe_open
from training_runs import EXPERTS
from transformers import AutoModelForCausalLM

from moe_ray.config.model import ModelConfig
from moe_ray.experts import Expert, masks_from_experts
from moe_ray.finetuning.adapter import apply_adapter, expert_weights, hash_weights, merge_adapter, save_adapter
from moe_ray.finetuning.merge_files import OtherLayout, merge_files
from moe_ray.finetuning.trainable_experts import trainable_experts
from moe_ray.models.loading import build_without_weights
from moe_ray.models.moe_layers import find_moe_layers


def move(model, folder):
    """The model with every number of some experts moved, as its adapter in the folder says."""
    layers = find_moe_layers(model)
    experts = [Expert(layers.layers[row], expert) for pairs in EXPERTS.values() for row, expert in pairs]
    masks = masks_from_experts({0: experts}, layers=layers.layers, num_experts=layers.num_experts)
    base_hash = hash_weights(expert_weights(model, list(masks.union_experts)))
    generator = torch.Generator().manual_seed(0)
    with trainable_experts(model, masks.union) as trainable:
        with torch.no_grad():
            for parameters in trainable.parameters.values():
                for parameter in parameters.values():
                    parameter.add_(torch.randn(parameter.shape, generator=generator))
        save_adapter(folder, trainable, base="tiny", base_hash=base_hash, mask_hash=masks.digest())
    apply_adapter(model, folder)
    return model


def merged_in_files(base, tmp_path, dtype):
    config = ModelConfig(path=str(base))
    merge_files(build_without_weights(config), base, tmp_path / "adapter", tmp_path / "files", dtype=dtype)
    return tmp_path / "files"


@pytest.mark.slow
@pytest.mark.parametrize("family", SOME_FAMILIES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_number_is_as_in_the_model_that_was_trained(family, dtype, tmp_path):
    model = build(family, dtype=dtype)
    model.save_pretrained(tmp_path / "base", max_shard_size="20KB")
    trained = state_of(move(model, tmp_path / "adapter"))
    files = merged_in_files(tmp_path / "base", tmp_path, dtype)
    loaded = dict(AutoModelForCausalLM.from_pretrained(files).named_parameters())
    assert loaded
    for name, parameter in loaded.items():
        assert torch.equal(parameter, trained[name].to(parameter.dtype)), name
    names = {path.name for path in (tmp_path / "base").iterdir()}
    assert {path.name for path in files.iterdir()} == names


@pytest.mark.slow
def test_a_run_in_float32_on_a_checkpoint_in_bfloat16_is_written_in_float32(tmp_path):
    build("olmoe", dtype=torch.bfloat16).save_pretrained(tmp_path / "base")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "base", dtype=torch.float32)
    trained = state_of(move(model, tmp_path / "adapter"))
    loaded = AutoModelForCausalLM.from_pretrained(merged_in_files(tmp_path / "base", tmp_path, torch.float32))
    assert loaded.dtype == torch.float32
    assert all(torch.equal(parameter, trained[name]) for name, parameter in loaded.named_parameters())


@pytest.mark.slow
def test_the_tensors_are_those_that_saving_the_model_writes(tmp_path):
    model = build("olmoe")
    model.save_pretrained(tmp_path / "base")
    move(model, tmp_path / "adapter")
    merge_adapter(AutoModelForCausalLM.from_pretrained(tmp_path / "base"), tmp_path / "adapter", tmp_path / "saved")
    files = merged_in_files(tmp_path / "base", tmp_path, torch.float32)
    with (
        safe_open(tmp_path / "saved/model.safetensors", "pt") as saved,
        safe_open(files / "model.safetensors", "pt") as got,
    ):
        assert set(saved.keys()) == set(got.keys())
        assert all(torch.equal(saved.get_tensor(name), got.get_tensor(name)) for name in saved.keys())  # noqa: SIM118
    assert json.loads((files / "config.json").read_text())["dtype"] == "float32"


@pytest.mark.parametrize("changed", ["base", "dtype"])
def test_a_base_that_is_not_the_adapters_is_left_to_the_model_itself(changed, tmp_path):
    model = build("olmoe")
    move(build("olmoe"), tmp_path / "adapter")
    if changed == "base":
        with torch.no_grad():
            model.model.layers[0].mlp.experts.down_proj += 1.0
    model.save_pretrained(tmp_path / "base")
    with pytest.raises(OtherLayout):
        merged_in_files(tmp_path / "base", tmp_path, torch.float32 if changed == "base" else torch.bfloat16)
    assert not (tmp_path / "files").exists()


MEASURED = """
import re, sys, threading, time
from pathlib import Path
import torch
from moe_ray.config.model import ModelConfig
from moe_ray.finetuning.merge_files import merge_files
from moe_ray.models.loading import build_without_weights

torch.set_num_threads(1)
folder = Path(sys.argv[1])
model = build_without_weights(ModelConfig(path=str(folder / "base")))


def held():
    return int(re.search(r"RssAnon:\\s+(\\d+)", Path("/proc/self/status").read_text())[1]) * 1024


before, peak, ended = held(), [0], threading.Event()


def watch():
    while not ended.wait(0.002):
        peak[0] = max(peak[0], held())


watching = threading.Thread(target=watch)
watching.start()
merge_files(model, folder / "base", folder / "adapter", folder / "files", dtype=torch.bfloat16)
ended.set()
watching.join()
print("peak", peak[0] - before)
"""


@pytest.mark.slow
def test_memory_stays_below_one_of_several_shards(tmp_path):
    from transformers import OlmoeConfig

    config = OlmoeConfig(
        vocab_size=64, hidden_size=512, intermediate_size=256, num_hidden_layers=6, num_attention_heads=4,
        num_key_value_heads=4, num_experts=32, num_experts_per_tok=4, pad_token_id=0,
    )  # fmt: skip
    model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    model.save_pretrained(tmp_path / "base", max_shard_size="60MB")
    shards = [path.stat().st_size for path in (tmp_path / "base").glob("*.safetensors")]
    assert len(shards) >= 3
    move(model, tmp_path / "adapter")
    done = subprocess.run(
        [sys.executable, "-c", MEASURED, str(tmp_path)], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert int(done.stdout.split()[1]) < 1.3 * max(shards)
