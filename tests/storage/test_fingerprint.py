"""A checkpoint is known by its content, part by part."""

import pytest

from moe_ray.storage.fingerprint import hash_checkpoint


@pytest.mark.parametrize(
    ("name", "text", "part"),
    [
        ("config.json", "{ }", "model configuration"),
        ("tokenizer.json", "{ }", "tokenizer"),
        ("tokenizer_config.json", '{"chat_template": "a", "eos_token": "b"}', "tokenizer"),
        ("tokenizer_config.json", '{"chat_template": "b"}', "chat template"),
        ("chat_template.jinja", "b", "chat template"),
        ("model.safetensors", "y", "model weights"),
        ("unknown.txt", "", "model configuration"),
    ],
)
def test_a_checkpoints_hash_says_which_part_of_it_changed(tmp_path, name, text, part):
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "tokenizer.json").write_text("{}")
    (tmp_path / "tokenizer_config.json").write_text('{"chat_template": "a"}')
    (tmp_path / "model.safetensors").write_bytes(b"x" * (17 << 20))
    first = hash_checkpoint(str(tmp_path), "main")
    assert hash_checkpoint(str(tmp_path), "main") == first
    (tmp_path / name).write_text(text)
    second = hash_checkpoint(str(tmp_path), "main")
    assert {key for key in first if first[key] != second[key]} == {part}


def test_a_hub_checkpoint_is_its_name_and_revision():
    assert hash_checkpoint("org/model", "v1") == {"model": "org/model", "model revision": "v1"}
