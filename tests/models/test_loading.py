"""A checkpoint is known before its weights are loaded, and one that cannot be loaded is named."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from families import build, state_of, token_ids
from safetensors.torch import load_file, save_file
from thinking_templates import QWEN3, thinking_tokenizer
from transformers import LlamaConfig, LlamaForCausalLM

from moe_ray.config.model import ModelConfig
from moe_ray.errors import InputError
from moe_ray.models import loading
from moe_ray.models.loading import (
    check_model,
    check_shardable,
    check_tokenizer,
    check_trainable,
    context_length,
    load_model,
    load_tokenizer,
    num_decoder_layers,
)
from moe_ray.models.moe_layers import MoELayer, find_moe_layers
from moe_ray.models.tokenization import encode_prompt

WITHOUT_THINKING = {"chat_template_options": {"enable_thinking": False}}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """A bfloat16 model whose first decoder layer has no experts, as a configuration."""
    path = tmp_path_factory.mktemp("checkpoint")
    build("deepseek_v3", dtype=torch.bfloat16).save_pretrained(path)
    return ModelConfig(path=str(path))


def test_the_layers_found_without_weights_are_those_of_the_loaded_model(checkpoint):
    found, loaded = check_model(checkpoint), find_moe_layers(load_model(checkpoint, device="cpu"))
    assert found.layers == loaded.layers
    assert (found.num_experts, found.num_experts_per_tok) == (loaded.num_experts, loaded.num_experts_per_tok)
    assert all(parameter.is_meta for layer in found for parameter in layer.expert_tensors().values())


def test_weights_go_straight_to_their_gpu(checkpoint, monkeypatch):
    asked = []
    monkeypatch.setattr(
        loading, "_load_all_weights", lambda _, **options: asked.append(options) or torch.nn.Linear(1, 1)
    )
    for device in ("cuda", "cuda:1", "cpu"):
        load_model(checkpoint, device=device)
    maps = [options.get("device_map") for options in asked]
    assert maps == [{"": torch.device("cuda", 0)}, {"": torch.device("cuda", 1)}, None]


def test_the_length_of_a_row_is_the_same_before_and_after_loading(checkpoint):
    model = load_model(checkpoint, device="cpu")
    assert context_length(checkpoint) == context_length(model) == model.config.max_position_embeddings


def test_decoder_layers_without_experts_are_counted_too(checkpoint):
    assert num_decoder_layers(checkpoint) == len(load_model(checkpoint, device="cpu").model.layers)


def test_on_a_cpu_the_checkpoints_weights_are_held_in_float32(checkpoint):
    model, saved = load_model(checkpoint, device="cpu"), state_of(build("deepseek_v3", dtype=torch.bfloat16))
    assert not model.training
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    assert all(torch.equal(parameter, saved[name].float()) for name, parameter in model.named_parameters())


def test_a_type_that_is_asked_for_is_the_one_that_is_loaded(checkpoint):
    model = load_model(ModelConfig(path=checkpoint.path, dtype="bfloat16"), device="cpu")
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    assert model(token_ids(1, 5)).logits.dtype == torch.bfloat16


@pytest.mark.parametrize("load", [check_model, load_model, context_length, num_decoder_layers])
def test_a_checkpoint_that_cannot_be_read_is_named(load, tmp_path):
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(InputError, match=rf"model\.path '{tmp_path}' cannot be loaded: .*; give a checkpoint folder"):
        load(ModelConfig(path=str(tmp_path)))


def test_a_model_without_experts_is_refused_before_its_weights_are_read(tmp_path):
    config = LlamaConfig(
        vocab_size=64, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2, pad_token_id=0
    )
    LlamaForCausalLM(config).save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(InputError, match="no Mixture-of-Experts layer"):
        check_model(ModelConfig(path=str(tmp_path)))


@pytest.mark.parametrize("method", ["fp8", "mxfp4"])
def test_a_checkpoint_of_codes_can_be_counted_and_is_refused_for_training_before_its_weights_are_read(
    checkpoint, tmp_path, method
):
    check_trainable(checkpoint)
    shutil.copytree(checkpoint.path, tmp_path, dirs_exist_ok=True)
    settings = json.loads((tmp_path / "config.json").read_text())
    settings["quantization_config"] = {"quant_method": method}
    (tmp_path / "config.json").write_text(json.dumps(settings))
    quantised = ModelConfig(path=str(tmp_path))
    check_model(quantised)
    with pytest.raises(InputError, match=rf"quantised as {method}.*before its quantisation"):
        check_trainable(quantised)


@pytest.mark.parametrize("family", ["olmoe", "mixtral", "gpt_oss", "deepseek_v3"])
def test_families_with_a_plan_to_shard_them_may_be_sharded(family, tmp_path):
    build(family).config.save_pretrained(tmp_path)
    check_shardable(ModelConfig(path=str(tmp_path)))


def test_what_cannot_be_sharded_is_refused_before_its_weights_are_read(checkpoint, tmp_path, monkeypatch):
    # The library's plan names the last norm `norm`, which this family calls otherwise.
    build("jamba").config.save_pretrained(tmp_path)
    with pytest.raises(
        InputError, match=r"finetune\.shard=fsdp: .* without model\.norm, which .*; set finetune\.shard=none"
    ):
        check_shardable(ModelConfig(path=str(tmp_path)))
    settings = json.loads((Path(checkpoint.path) / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**settings, "quantization_config": {"quant_method": "fp8"}}))
    with pytest.raises(InputError, match="is quantised as fp8, and codes are not sharded"):
        check_shardable(ModelConfig(path=str(tmp_path)))
    monkeypatch.setattr(MoELayer, "expert_modules", lambda layer: (layer.experts,) * layer.num_experts)
    with pytest.raises(InputError, match="every expert as a module of its own"):
        check_shardable(checkpoint)
    with pytest.raises(InputError, match=r"^model\.num_shards=3: model\.path .*; set model\.num_shards=1$"):
        check_shardable(checkpoint, asked="model.num_shards=3", otherwise="model.num_shards=1")


@pytest.fixture
def weights_of(tmp_path):
    """Writes a checkpoint whose tensors went through a function, and its configuration through another."""

    def write(edit_tensors=dict, edit_config=dict):
        build("olmoe").save_pretrained(tmp_path)
        tensors = edit_tensors(load_file(tmp_path / "model.safetensors"))
        save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
        settings = json.loads((tmp_path / "config.json").read_text())
        (tmp_path / "config.json").write_text(json.dumps(edit_config(settings)))
        return ModelConfig(path=str(tmp_path))

    return write


@pytest.mark.parametrize(
    ("lost", "said"),
    [("self_attn.q_proj.weight", "missing"), ("mlp.gate.weight", "missing"), ("down_proj.weight", "of another shape")],
)
def test_a_checkpoint_that_lacks_a_tensor_is_refused_and_gets_no_random_one(weights_of, lost, said):
    def without(tensors):
        del tensors[next(name for name in tensors if name.endswith(lost))]
        return tensors

    with pytest.raises(InputError, match=f"1 {said}, such as model.layers"):
        load_model(weights_of(without), device="cpu")


def test_a_checkpoint_with_a_tensor_that_the_model_has_not_is_refused(weights_of):
    config = weights_of(lambda tensors: tensors | {"model.layers.7.odd.weight": torch.zeros(3)})
    with pytest.raises(InputError, match=r"1 unknown to the model, such as model\.layers\.7\.odd\.weight"):
        load_model(config, device="cpu")


def test_another_vocabulary_than_the_configurations_is_refused(weights_of):
    config = weights_of(edit_config=lambda settings: settings | {"vocab_size": 80})
    with pytest.raises(InputError, match=r"2 of another shape, such as .*\(64, 24\) instead of \(80, 24\)"):
        load_model(config, device="cpu")


@pytest.mark.parametrize(("key", "value"), [("hidden_size", "many"), ("num_attention_heads", -2), ("vocab_size", None)])
def test_a_configuration_of_the_wrong_kind_is_named(weights_of, key, value):
    config = weights_of(edit_config=lambda settings: settings | {key: value})
    with pytest.raises(InputError, match=r"model\.path .*; give a checkpoint folder or a hub name"):
        check_model(config)


def test_pickled_weights_are_refused_where_they_would_be_read(tmp_path):
    model = build("olmoe")
    model.save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    torch.save(model.state_dict(), tmp_path / "pytorch_model.bin")
    for load in (check_model, load_model):
        with pytest.raises(InputError):
            load(ModelConfig(path=str(tmp_path)))


@pytest.mark.slow
def test_a_tokenizer_of_another_model_is_named(untrained_model_path, tmp_path):
    shutil.copytree(untrained_model_path, tmp_path, dirs_exist_ok=True)
    check_tokenizer(ModelConfig(path=str(tmp_path)))
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"vocab_size": 100}))
    with pytest.raises(InputError, match=r"token ids up to .* but the model has embeddings for 100 tokens"):
        check_tokenizer(ModelConfig(path=str(tmp_path)))


@pytest.mark.slow
@pytest.mark.parametrize("text", ["{", "[]", '{"model": 3}', "\udcff", '{"version": "1.0"}'])
def test_a_tokenizer_that_is_none_is_named(untrained_model_path, tmp_path, text):
    shutil.copytree(untrained_model_path, tmp_path, dirs_exist_ok=True)
    (tmp_path / "tokenizer.json").write_bytes(text.encode("utf-8", "surrogateescape"))
    with pytest.raises(InputError, match=r"cannot be loaded: .*; give a checkpoint folder"):
        check_tokenizer(ModelConfig(path=str(tmp_path)))


# Options of the chat template


def test_the_tokenizer_has_the_options_of_the_configuration(checkpoint):
    thinking_tokenizer(QWEN3).save_pretrained(checkpoint.path)
    plain, quiet = load_tokenizer(checkpoint), load_tokenizer(replace(checkpoint, **WITHOUT_THINKING))
    question = [{"role": "user", "content": "?"}]
    assert encode_prompt(quiet, question) == encode_prompt(plain, question, after_thought=True)
    assert encode_prompt(quiet, question) != encode_prompt(plain, question)


def test_an_option_that_the_template_does_not_know_is_refused_before_weights_are_loaded(checkpoint):
    thinking_tokenizer(QWEN3).save_pretrained(checkpoint.path)
    check_model(replace(checkpoint, **WITHOUT_THINKING))
    with pytest.raises(InputError, match=r"model\.chat_template_options: got 'thinking', expected a variable"):
        check_model(replace(checkpoint, chat_template_options={"thinking": False}))


@pytest.mark.parametrize("name", ["a b", "1", "", "x}}{{ 1"])
def test_an_option_is_the_name_of_a_variable(name):
    with pytest.raises(InputError, match=r"model\.chat_template_options: got .* expected names of variables"):
        ModelConfig(chat_template_options={name: 1})
