"""Tokenizer, configuration and chat template agree on what ends and what pads."""

from __future__ import annotations

from pathlib import Path

import pytest
from dense_checkpoints import TOKENS, make_dense, make_folder

from moe_ray.errors import InputError
from moe_ray.upcycling.dense_checkpoint import load_dense
from moe_ray.upcycling.special_tokens import turn_end_id


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
