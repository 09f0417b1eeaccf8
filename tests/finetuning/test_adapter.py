"""An adapter carries what was learned, exactly, to its own base model and to no other."""

from __future__ import annotations

import json

import pytest
import torch
from families import SOME_FAMILIES, VOCAB, batch_masks, build, state_of, token_ids
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers
from training_runs import BATCHES, CONFIG, EXPERTS
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

from moe_ray.errors import InputError
from moe_ray.experts import Expert
from moe_ray.finetuning.adapter import (
    adapter_applied,
    apply_adapter,
    expert_weights,
    load_adapter,
    merge_adapter,
    save_adapter,
)
from moe_ray.finetuning.adapter_tensors import hash_weights
from moe_ray.finetuning.trainable_experts import trainable_experts
from moe_ray.finetuning.trainer import MaskedTrainer

IDS = token_ids(3, 11)
HUB_NAMES = {
    "olmoe": "model.layers.0.mlp.experts.5.gate_proj.weight",
    "qwen3_moe": "model.layers.0.mlp.experts.5.gate_proj.weight",
    "mixtral": "model.layers.0.block_sparse_moe.experts.5.w1.weight",
    "deepseek_v3": "model.layers.1.mlp.experts.5.gate_proj.weight",
}


def learn(model, folder):
    """Trains the model and saves what it learned."""
    masks = batch_masks(model, EXPERTS)
    base_hash = hash_weights(expert_weights(model, list(masks.union_experts)))
    with trainable_experts(model, masks.union) as trainable:
        MaskedTrainer(model, trainable, BATCHES, masks, CONFIG, pad_id=0, seed=0).run()
        save_adapter(folder, trainable, base="tiny", base_hash=base_hash, mask_hash=masks.digest())
    return model


@pytest.fixture(scope="module")
def learned(tmp_path_factory):
    """A trained OLMoE's logits and the folder of its adapter."""
    folder = tmp_path_factory.mktemp("adapter")
    return learn(build("olmoe"), folder)(IDS).logits, folder


# Round trips


@pytest.mark.slow
@pytest.mark.parametrize("family", SOME_FAMILIES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_base_and_adapter_give_the_trained_models_logits(family, dtype, tmp_path):
    trained, again = learn(build(family, dtype=dtype), tmp_path), build(family, dtype=dtype)
    assert not torch.equal(again(IDS).logits, trained(IDS).logits)
    apply_adapter(again, tmp_path)
    assert torch.equal(again(IDS).logits, trained(IDS).logits)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_adapter_is_stored_in_the_models_type_and_says_so(dtype, tmp_path):
    learn(build("olmoe", dtype=dtype), tmp_path)
    about, tensors = load_adapter(tmp_path)
    assert about["dtype"] == str(dtype).removeprefix("torch.")
    assert {tensor.dtype for by_name in tensors.values() for tensor in by_name.values()} == {dtype}


def test_after_the_context_the_base_is_back_bit_for_bit(learned):
    model = build("olmoe")
    before = state_of(model)
    with adapter_applied(model, learned[1]):
        assert torch.equal(model(IDS).logits, learned[0])
    assert all(torch.equal(tensor, before[name]) for name, tensor in state_of(model).items())


def test_after_an_error_in_the_context_the_base_is_back(learned):
    model = build("olmoe")
    before = state_of(model)
    with pytest.raises(RuntimeError, match="from the caller"), adapter_applied(model, learned[1]):
        raise RuntimeError("from the caller")
    assert all(torch.equal(tensor, before[name]) for name, tensor in state_of(model).items())


def test_an_adapter_holds_the_union_only(learned):
    tensors = load_file(learned[1] / "experts.safetensors")
    assert {tuple(map(int, name.split(".")[:2])) for name in tensors} == {
        pair for pairs in EXPERTS.values() for pair in pairs
    }


def test_an_adapter_says_what_it_belongs_to(learned):
    about, tensors = load_adapter(learned[1])
    assert (about["base"], about["model_type"], about["layers"], about["num_experts"]) == ("tiny", "olmoe", [0, 1], 8)
    assert about["mask_hash"] == batch_masks(build("olmoe"), EXPERTS).digest()
    assert list(tensors) == sorted(tensors)


# Merging


@pytest.mark.slow
@pytest.mark.parametrize("family", HUB_NAMES)
def test_the_merged_checkpoint_loads_to_the_trained_models_logits(family, tmp_path):
    trained = learn(build(family), tmp_path / "adapter")
    merge_adapter(build(family), tmp_path / "adapter", tmp_path / "merged")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", experts_implementation="eager")
    assert torch.equal(loaded(IDS).logits, trained(IDS).logits)


@pytest.mark.slow
@pytest.mark.parametrize("family", HUB_NAMES)
def test_the_merged_checkpoint_names_experts_as_the_familys_hub_checkpoints_do(family, tmp_path):
    learn(build(family), tmp_path / "adapter")
    merge_adapter(build(family), tmp_path / "adapter", tmp_path / "merged")
    assert HUB_NAMES[family] in load_file(tmp_path / "merged" / "model.safetensors")


def test_merging_leaves_the_model_given_as_it_was(learned, tmp_path):
    model = build("olmoe")
    before = state_of(model)
    merge_adapter(model, learned[1], tmp_path)
    assert all(torch.equal(tensor, before[name]) for name, tensor in state_of(model).items())


def test_the_merged_checkpoint_has_the_tokenizer(learned, tmp_path):
    words = Tokenizer(models.WordLevel({f"w{n}": n for n in range(VOCAB)}, unk_token="w0"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, chat_template="{{ messages[0]['content'] }}")
    merge_adapter(build("olmoe"), learned[1], tmp_path, tokenizer=tokenizer)
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    assert loaded("w3 w9")["input_ids"] == [3, 9]
    assert loaded.chat_template == tokenizer.chat_template


# Refusals


def test_another_base_is_refused(learned):
    model = build("olmoe")
    with torch.no_grad():
        model.model.layers[0].mlp.experts.down_proj[5, 0, 0] += 1e-3
    with pytest.raises(InputError, match="not those it was trained from"):
        apply_adapter(model, learned[1])


def test_a_base_that_differs_elsewhere_only_is_accepted(learned):
    model = build("olmoe")
    with torch.no_grad():
        model.lm_head.weight[0, 0] += 1e-3
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    apply_adapter(model, learned[1])
    assert any(not torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_a_base_in_another_type_is_refused_with_the_type_that_is_wanted(learned, tmp_path):
    with pytest.raises(InputError, match="load the base checkpoint it names, in float32"):
        apply_adapter(build("olmoe", dtype=torch.bfloat16), learned[1])
    learn(build("olmoe", dtype=torch.bfloat16), tmp_path)
    with pytest.raises(InputError, match="load the base checkpoint it names, in bfloat16"):
        apply_adapter(build("olmoe"), tmp_path)


@pytest.mark.parametrize("family", ["mixtral", "deepseek_v3", "gpt_oss"])
def test_another_layout_is_refused(family, learned):
    with pytest.raises(InputError, match=r"got a model with \(type, layers, experts\)"):
        apply_adapter(build(family), learned[1])


def test_another_shape_is_refused(learned, tmp_path):
    tensors = load_file(learned[1] / "experts.safetensors")
    save_file({name: tensor[:-1].contiguous() for name, tensor in tensors.items()}, tmp_path / "experts.safetensors")
    (tmp_path / "adapter.json").write_text((learned[1] / "adapter.json").read_text())
    with pytest.raises(InputError, match="has shapes"):
        apply_adapter(build("olmoe"), tmp_path)


def test_a_refused_adapter_changes_nothing(learned):
    model = build("mixtral")
    before = state_of(model)
    with pytest.raises(InputError):
        apply_adapter(model, learned[1])
    assert all(torch.equal(tensor, before[name]) for name, tensor in state_of(model).items())


def test_a_folder_without_adapter_is_refused(tmp_path):
    with pytest.raises(InputError, match="holds no adapter"):
        load_adapter(tmp_path)


def test_another_format_is_refused(tmp_path, learned):
    about = json.loads((learned[1] / "adapter.json").read_text())
    (tmp_path / "adapter.json").write_text(json.dumps(about | {"format": 3}))
    with pytest.raises(InputError, match="got adapter format 3, expected one of"):
        load_adapter(tmp_path)


def test_a_saved_adapter_without_description_is_unfinished(tmp_path, monkeypatch):
    learn(build("olmoe"), tmp_path)

    def fail(*args):
        raise OSError("disk full")

    monkeypatch.setattr("moe_ray.finetuning.adapter.save_file", fail)
    with pytest.raises(OSError, match="disk full"):
        learn(build("olmoe"), tmp_path)
    with pytest.raises(InputError, match="holds no adapter"):
        load_adapter(tmp_path)


def test_the_hash_of_weights_sees_expert_name_type_and_bytes():
    tensor = torch.arange(4.0)
    variants = [
        {Expert(0, 1): {"w": tensor}},
        {Expert(1, 0): {"w": tensor}},
        {Expert(0, 1): {"v": tensor}},
        {Expert(0, 1): {"w": tensor.bfloat16()}},
        {Expert(0, 1): {"w": tensor.view(2, 2)}},
        {Expert(0, 1): {"w": tensor + 1}},
    ]
    assert len({hash_weights(variant) for variant in variants}) == len(variants)
