"""Upcycling keeps the dense model's function, and says clearly what it cannot upcycle."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from dense_checkpoints import (
    CHAT_TEMPLATE,
    LOGIT_TOLERANCE,
    MERGE,
    SPECIAL_TOKENS,
    TOKENS,
    make_dense,
    make_folder,
    make_zip,
)
from transformers import (
    AutoModelForCausalLM,
    LlamaForCausalLM,
    MixtralForCausalLM,
    OlmoeConfig,
    OlmoeForCausalLM,
)

from moe_ray.errors import InputError
from moe_ray.upcycling.dense_checkpoint import extract_gguf, fingerprint, load_dense
from moe_ray.upcycling.special_tokens import turn_end_id
from moe_ray.upcycling.upcycle import upcycle

LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}


def write_gguf(path: Path, dense: LlamaForCausalLM, *, architecture: str = "llama", rope_scaling: bool = False) -> Path:
    """Writes ``dense`` as llama.cpp does: its own names, query and key rows interleaved for its rotary layout."""
    gguf = pytest.importorskip("gguf", reason="the gguf package is optional")
    config = dense.config
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_name("tiny")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_vocab_size(config.vocab_size)
    if rope_scaling:
        writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(TOKENS)
    writer.add_token_merges([MERGE])
    control, normal = gguf.TokenType.CONTROL, gguf.TokenType.NORMAL
    writer.add_token_types([control if token in SPECIAL_TOKENS else normal for token in TOKENS])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_pad_token_id(2)
    writer.add_unk_token_id(0)
    writer.add_chat_template(CHAT_TEMPLATE)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config.num_hidden_layers)
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
    for name, weight in dense.state_dict().items():
        if name == "lm_head.weight" and config.tie_word_embeddings:
            continue
        array = weight.numpy()
        num_heads = next((heads[part] for part in heads if part in name), None)
        if num_heads is not None:
            array = array.reshape(num_heads, 2, -1, array.shape[1]).swapaxes(1, 2).reshape(array.shape)
        writer.add_tensor(names.get_name(name, try_suffixes=(".weight",)), array.copy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@torch.no_grad()
def logits(model: Any, num_tokens: int = 64) -> torch.Tensor:
    ids = torch.randint(3, len(TOKENS), (2, num_tokens), generator=torch.Generator().manual_seed(7))
    return torch.as_tensor(model(input_ids=ids).logits)


def routers(model: MixtralForCausalLM) -> torch.Tensor:
    return torch.stack([weight for name, weight in model.named_parameters() if name.endswith("mlp.gate.weight")])


# --- the model ---


@pytest.mark.parametrize(
    "overrides",
    [
        pytest.param({}, id="plain"),
        pytest.param({"tie_word_embeddings": True}, id="tied embeddings"),
        pytest.param({"num_key_value_heads": 2}, id="grouped-query attention"),
        pytest.param({"num_key_value_heads": 1, "head_dim": 16}, id="own head size"),
        pytest.param({"rope_parameters": LLAMA3_ROPE}, id="llama 3 rope scaling"),
        pytest.param({"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 4.0}}, id="linear rope"),
        pytest.param({"hidden_act": "gelu"}, id="other activation"),
    ],
)
def test_logits_equal_the_dense_models(overrides: dict[str, Any]) -> None:
    dense = make_dense(**overrides)
    moe = upcycle(dense, num_experts=4, num_experts_per_tok=2, seed=0)
    torch.testing.assert_close(logits(moe), logits(dense), atol=LOGIT_TOLERANCE, rtol=0)


@pytest.mark.parametrize(("num_experts", "num_experts_per_tok"), [(1, 1), (4, 1), (4, 4), (16, 3)])
def test_logits_equal_for_any_number_of_experts(num_experts: int, num_experts_per_tok: int) -> None:
    dense = make_dense()
    moe = upcycle(dense, num_experts=num_experts, num_experts_per_tok=num_experts_per_tok, seed=0)
    torch.testing.assert_close(logits(moe), logits(dense), atol=LOGIT_TOLERANCE, rtol=0)


@pytest.mark.parametrize("tied", [False, True])
def test_from_pretrained_returns_the_same_model(tmp_path: Path, tied: bool) -> None:
    moe = upcycle(make_dense(tie_word_embeddings=tied), num_experts=4, num_experts_per_tok=2, seed=0)
    moe.save_pretrained(tmp_path)
    reloaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert isinstance(reloaded, MixtralForCausalLM)
    assert torch.equal(logits(reloaded), logits(moe))


def test_the_dense_model_is_unchanged_and_shares_no_memory() -> None:
    dense = make_dense(tie_word_embeddings=True)
    before = logits(dense)
    moe = upcycle(dense, num_experts=4, num_experts_per_tok=2, seed=0)
    with torch.no_grad():
        for parameter in moe.parameters():
            parameter.zero_()
    assert torch.equal(logits(dense), before)


def test_experts_are_independent_copies() -> None:
    dense = make_dense()
    moe = upcycle(dense, num_experts=4, num_experts_per_tok=2, seed=0)
    experts = moe.model.layers[1].mlp.experts
    with torch.no_grad():
        experts.down_proj[0].zero_()
    assert torch.equal(experts.down_proj[1], dense.model.layers[1].mlp.down_proj.weight)


def test_weights_of_the_routed_experts_sum_to_one() -> None:
    moe = upcycle(make_dense(), num_experts=8, num_experts_per_tok=3, seed=0)
    seen: list[torch.Tensor] = []
    for layer in moe.model.layers:
        layer.mlp.experts.register_forward_pre_hook(lambda _, args: seen.append(args[2].sum(-1)))
    logits(moe)
    assert len(seen) == 2
    torch.testing.assert_close(torch.cat(seen), torch.ones(2 * 128), atol=1e-6, rtol=0)


def test_routing_depends_on_the_input() -> None:
    moe = upcycle(make_dense(), num_experts=8, num_experts_per_tok=2, seed=0)
    seen: list[torch.Tensor] = []
    for layer in moe.model.layers:
        layer.mlp.experts.register_forward_pre_hook(lambda _, args: seen.append(args[1].unique()))
    logits(moe)
    assert all(len(experts) == 8 for experts in seen)


def test_router_rows_have_norm_one_and_differ_by_layer() -> None:
    weights = routers(upcycle(make_dense(), num_experts=8, num_experts_per_tok=2, seed=0))
    torch.testing.assert_close(weights.norm(dim=-1), torch.ones(2, 8), atol=1e-6, rtol=0)
    assert not torch.equal(weights[0], weights[1])


def test_routers_follow_the_seed_and_nothing_else() -> None:
    dense = make_dense()
    first, again, other = (upcycle(dense, num_experts=4, num_experts_per_tok=2, seed=seed) for seed in (0, 0, 1))
    assert torch.equal(routers(first), routers(again))
    assert not torch.equal(routers(first), routers(other))


def test_upcycling_leaves_the_global_generator_alone() -> None:
    dense = make_dense()
    before = torch.get_rng_state()
    upcycle(dense, num_experts=4, num_experts_per_tok=2, seed=0)
    assert torch.equal(torch.get_rng_state(), before)


def test_dtype_and_generation_settings_are_kept() -> None:
    dense: Any = make_dense().to(torch.bfloat16)
    dense.generation_config.eos_token_id = [2, 5]
    moe = upcycle(dense, num_experts=2, num_experts_per_tok=1, seed=0)
    assert {parameter.dtype for parameter in moe.parameters()} == {torch.bfloat16}
    assert moe.generation_config is not dense.generation_config
    assert moe.generation_config.eos_token_id == [2, 5]


@pytest.mark.parametrize("num_experts_per_tok", [0, 5])
def test_an_impossible_number_of_routed_experts_is_refused(num_experts_per_tok: int) -> None:
    with pytest.raises(InputError, match=f"num_experts_per_tok: got {num_experts_per_tok} with num_experts 4"):
        upcycle(make_dense(), num_experts=4, num_experts_per_tok=num_experts_per_tok, seed=0)


@pytest.mark.parametrize("bias", ["attention_bias", "mlp_bias"])
def test_biases_are_refused(bias: str) -> None:
    with pytest.raises(InputError, match=f"got {bias}=True"):
        upcycle(make_dense(**{bias: True}), num_experts=4, num_experts_per_tok=2, seed=0)


def test_a_model_that_is_no_llama_is_refused() -> None:
    config = OlmoeConfig(
        vocab_size=64,
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_experts=2,
        eos_token_id=2,
    )
    with pytest.raises(InputError, match="got model_type 'olmoe', expected 'llama'"):
        upcycle(OlmoeForCausalLM(config), num_experts=4, num_experts_per_tok=2, seed=0)


def test_weights_without_a_place_are_refused() -> None:
    dense = make_dense()
    dense.model.layers[0].mlp.register_parameter("adapter", torch.nn.Parameter(torch.zeros(2)))
    with pytest.raises(InputError, match=r"got 1 weights Mixtral has no place for .*mlp\.adapter"):
        upcycle(dense, num_experts=4, num_experts_per_tok=2, seed=0)


def test_a_model_without_language_head_is_refused() -> None:
    with pytest.raises(InputError, match="got no weight"):
        upcycle(make_dense().model, num_experts=4, num_experts_per_tok=2, seed=0)


# --- loading ---


def test_a_checkpoint_folder_loads(tmp_path: Path) -> None:
    dense = make_dense()
    model, tokenizer = load_dense(make_folder(tmp_path, dense))
    assert torch.equal(logits(model), logits(dense))
    assert not model.training
    assert tokenizer.decode(tokenizer("tea & rain")["input_ids"]) == "tea & rain"


def test_padding_does_not_use_the_end_token(tmp_path: Path) -> None:
    model, tokenizer = load_dense(make_folder(tmp_path))
    assert tokenizer.pad_token == "<|endoftext|>"
    assert (model.config.pad_token_id, model.generation_config.pad_token_id) == (0, 0)
    assert (model.config.eos_token_id, model.generation_config.eos_token_id) == (2, 2)


def test_generation_also_stops_at_the_end_of_a_turn(tmp_path: Path) -> None:
    source = make_folder(tmp_path, make_dense(eos_token_id=0), eos_token="<|endoftext|>", pad_token="<|endoftext|>")
    model, tokenizer = load_dense(source)
    assert turn_end_id(tokenizer) == tokenizer.eos_token_id == 2
    assert model.generation_config.eos_token_id == [0, 2]


def test_without_a_free_special_token_padding_uses_the_end_token(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    source = make_folder(tmp_path, make_dense(eos_token_id=[0, 2]))
    model, tokenizer = load_dense(source)
    assert tokenizer.pad_token_id == model.config.pad_token_id == 0
    assert "no special token is free for padding" in caplog.text


def test_a_broken_chat_template_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="chat template: got no roles"):
        load_dense(make_folder(tmp_path, chat_template="{{ raise_exception('no roles') }}"))


def test_a_tokenizer_of_another_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=f"tokenizer: got {len(TOKENS)} tokens, expected at most the model's 100"):
        load_dense(make_folder(tmp_path, make_dense(vocab_size=100)))


def test_a_checkpoint_that_lacks_weights_is_refused(tmp_path: Path) -> None:
    dense = make_dense()
    state = {name: weight for name, weight in dense.state_dict().items() if "layers.1.mlp.up_proj" not in name}
    make_folder(tmp_path)
    dense.save_pretrained(tmp_path, state_dict=state)
    with pytest.raises(InputError, match=r"got no weights for model\.layers\.1\.mlp\.up_proj"):
        load_dense(tmp_path)


@pytest.mark.parametrize("name", ["missing.gguf", "missing.whl", "no/such/folder", "./missing"])
def test_a_missing_file_is_refused(name: str) -> None:
    with pytest.raises(InputError, match="source: nothing at"):
        load_dense(name)


def test_a_folder_that_is_no_checkpoint_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="expected a checkpoint folder or hub name with config and weights"):
        load_dense(tmp_path)


@pytest.mark.parametrize(("pattern", "reason"), [("*.safetensors", "weights"), ("tokenizer*", "tokenizer")])
def test_an_incomplete_checkpoint_is_refused(tmp_path: Path, pattern: str, reason: str) -> None:
    make_folder(tmp_path)
    for path in tmp_path.glob(pattern):
        path.unlink()
    with pytest.raises(InputError, match=reason):
        load_dense(tmp_path)


# --- GGUF and archives ---


@pytest.mark.parametrize("tied", [False, True])
def test_a_gguf_file_loads_with_tokenizer_and_template(tmp_path: Path, tied: bool) -> None:
    dense = make_dense(num_key_value_heads=2, tie_word_embeddings=tied)
    model, tokenizer = load_dense(write_gguf(tmp_path / "tiny.gguf", dense))
    torch.testing.assert_close(logits(model), logits(dense), atol=LOGIT_TOLERANCE, rtol=0)
    assert (tokenizer.eos_token, tokenizer.pad_token) == ("<|im_end|>", "<|endoftext|>")
    prompt = tokenizer.apply_chat_template(
        [{"role": "user", "content": "Hi"}], add_generation_prompt=True, tokenize=False
    )
    assert prompt == "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"


def test_a_wheel_with_one_gguf_loads(tmp_path: Path) -> None:
    dense = make_dense()
    content = write_gguf(tmp_path / "tiny.gguf", dense).read_bytes()
    wheel = make_zip(tmp_path / "tiny-1-py3-none-any.whl", **{"pkg/model.gguf": content, "pkg/__init__.py": b""})
    model, _ = load_dense(wheel, extract_dir=tmp_path / "extracted")
    torch.testing.assert_close(logits(model), logits(dense), atol=LOGIT_TOLERANCE, rtol=0)


def test_gguf_rope_scaling_is_refused_because_it_would_be_dropped(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="got scaled rotary positions"):
        load_dense(write_gguf(tmp_path / "tiny.gguf", make_dense(), rope_scaling=True))


def test_a_gguf_of_another_architecture_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="got architecture 'gemma', expected 'llama'"):
        load_dense(write_gguf(tmp_path / "tiny.gguf", make_dense(), architecture="gemma"))


def test_a_file_that_is_no_gguf_is_refused(tmp_path: Path) -> None:
    pytest.importorskip("gguf", reason="the gguf package is optional")
    path = tmp_path / "tiny.gguf"
    path.write_bytes(b"not a model" * 10)
    with pytest.raises(InputError, match="got a file that is not GGUF"):
        load_dense(path)


@pytest.mark.parametrize("member", ["../../outside.gguf", "/outside.gguf", "..\\outside.gguf", "a/../../outside.gguf"])
def test_extraction_stays_in_its_folder(tmp_path: Path, member: str) -> None:
    folder = tmp_path / "a" / "b"
    archive = make_zip(tmp_path / "model.zip", **{member: b"content"})
    target = extract_gguf(archive, folder)
    assert target == folder / "outside.gguf"
    assert target.read_bytes() == b"content"
    assert sorted(path for path in tmp_path.rglob("*") if path.is_file()) == [target, archive]


@pytest.mark.parametrize("members", [{}, {"a.gguf": b"1", "b/a.gguf": b"2"}])
def test_an_archive_without_exactly_one_gguf_is_refused(tmp_path: Path, members: dict[str, bytes]) -> None:
    with pytest.raises(InputError, match=f"got {len(members)} .gguf files, expected exactly 1"):
        extract_gguf(make_zip(tmp_path / "model.zip", **members), tmp_path / "out")


def test_a_damaged_archive_is_refused_and_leaves_no_gguf(tmp_path: Path) -> None:
    archive = make_zip(tmp_path / "model.zip", **{"a.gguf": b"content"})
    archive.write_bytes(archive.read_bytes().replace(b"content", b"CONTENT"))
    with pytest.raises(InputError, match="got a damaged archive"):
        extract_gguf(archive, tmp_path / "out")
    assert not (tmp_path / "out" / "a.gguf").exists()


def test_an_archive_needs_a_folder_to_extract_into(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="extract_dir: got None"):
        load_dense(make_zip(tmp_path / "model.zip", **{"a.gguf": b"content"}))


def test_the_fingerprint_follows_content_and_not_place(tmp_path: Path) -> None:
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "weights").write_bytes(b"same")
    assert fingerprint(tmp_path / "one") == fingerprint(tmp_path / "two")
    (tmp_path / "two" / "weights").write_bytes(b"other")
    assert fingerprint(tmp_path / "one") != fingerprint(tmp_path / "two")
