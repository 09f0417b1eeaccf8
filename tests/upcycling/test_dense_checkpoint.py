"""A dense model is loaded whole, from a folder, a GGUF file or an archive, or refused with the reason."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from dense_checkpoints import (
    CHAT_TEMPLATE,
    LOGIT_TOLERANCE,
    MERGE,
    SPECIAL_TOKENS,
    TOKENS,
    logits,
    make_dense,
    make_folder,
    make_zip,
)
from transformers import LlamaForCausalLM

from moe_ray.errors import InputError
from moe_ray.upcycling.dense_checkpoint import extract_gguf, fingerprint, load_dense


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


def test_a_checkpoint_folder_loads(tmp_path: Path) -> None:
    dense = make_dense()
    model, tokenizer = load_dense(make_folder(tmp_path, dense))
    assert torch.equal(logits(model), logits(dense))
    assert not model.training
    assert tokenizer.decode(tokenizer("tea & rain")["input_ids"]) == "tea & rain"


def test_a_checkpoint_that_lacks_weights_is_refused(tmp_path: Path) -> None:
    dense = make_dense()
    state = {name: weight for name, weight in dense.state_dict().items() if "layers.1.mlp.up_proj" not in name}
    make_folder(tmp_path)
    dense.save_pretrained(tmp_path, state_dict=state)
    with pytest.raises(InputError, match=r"got no weights for model\.layers\.1\.mlp\.up_proj"):
        load_dense(tmp_path)


def test_a_folder_that_is_no_checkpoint_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="expected a checkpoint folder or hub name with config and weights"):
        load_dense(tmp_path)


def test_a_whole_number_for_a_float_is_read_and_a_text_refused_in_one_sentence(tmp_path: Path) -> None:
    dense = make_dense()
    make_folder(tmp_path, dense)
    fields = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(fields | {"initializer_range": 1}))
    assert torch.equal(logits(load_dense(tmp_path)[0]), logits(dense))
    (tmp_path / "config.json").write_text(json.dumps(fields | {"initializer_range": "small"}))
    with pytest.raises(InputError, match=r"'initializer_range' expected float, got str \(value: 'small'\)"):
        load_dense(tmp_path)


@pytest.mark.parametrize(("pattern", "reason"), [("*.safetensors", "weights"), ("tokenizer*", "tokenizer")])
def test_an_incomplete_checkpoint_is_refused(tmp_path: Path, pattern: str, reason: str) -> None:
    make_folder(tmp_path)
    for path in tmp_path.glob(pattern):
        path.unlink()
    with pytest.raises(InputError, match=reason):
        load_dense(tmp_path)


# --- GGUF and archives ---


@pytest.mark.slow
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
