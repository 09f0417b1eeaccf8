"""Learned experts are found in a run, a folder and on the hub, and make the repaired model; they can be pushed there."""

from __future__ import annotations

import json

import pytest
import torch
from families import batch_masks, build, token_ids
from text_batches import BATCHES, EXPERTS
from transformers import AutoModelForCausalLM
from word_tokenizer import make_tokenizer

import moe_ray
from moe_ray.config.finetune import FinetuneConfig
from moe_ray.config.run import Config
from moe_ray.errors import InputError
from moe_ray.finetuning.fine_tune import fine_tune
from moe_ray.run_directory import RunDirectory

IDS = token_ids(2, 9)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A folder with a base checkpoint and a run that learned experts of it, and the repaired model's logits."""
    folder = tmp_path_factory.mktemp("made")
    model, tokenizer = build("olmoe"), make_tokenizer()
    model.save_pretrained(folder / "base")
    tokenizer.save_pretrained(folder / "base")
    experts = folder / "run" / "finetune"
    config = FinetuneConfig(epochs=1, learning_rate=1e-2)
    masks = batch_masks(model, EXPERTS)
    fine_tune(model, tokenizer, BATCHES, masks, config=config, adapter=experts, base=str(folder / "base"))
    RunDirectory.open(str(folder / "run")).write_config(Config())
    with torch.no_grad():
        return folder, model(IDS).logits


def logits(model):
    with torch.no_grad():
        return model(IDS).logits


@pytest.mark.parametrize("name", ["run", "run/finetune"])
def test_a_run_and_an_adapters_folder_give_the_repaired_model(made, name):
    folder, expected = made
    assert torch.equal(logits(moe_ray.load_repaired(folder / name, model=build("olmoe"))), expected)


def test_without_a_model_the_base_that_the_adapter_names_is_loaded(made):
    folder, expected = made
    repaired = moe_ray.load_repaired(str(folder / "run"), device="cpu")
    assert not repaired.training
    # The model that was tuned has its rotary buffers in the order of its building; a loaded one computes them anew.
    torch.testing.assert_close(logits(repaired), expected)


def test_an_adapter_is_in_force_inside_the_context_only(made):
    folder, expected = made
    adapter, model = moe_ray.Adapter.from_pretrained(folder / "run"), build("olmoe")
    before = logits(model)
    with adapter.applied(model):
        assert torch.equal(logits(model), expected)
    assert torch.equal(logits(model), before)
    assert "experts, base" in repr(adapter)


def test_a_merged_checkpoint_is_the_repaired_model(made, tmp_path):
    folder, expected = made
    adapter = moe_ray.Adapter.from_pretrained(folder / "run")
    adapter.merge(tmp_path / "merged")
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", experts_implementation="eager")
    torch.testing.assert_close(logits(merged), expected)
    with pytest.raises(InputError, match="already holds files"):
        adapter.merge(tmp_path / "merged")


def test_what_was_pushed_is_loaded_by_its_name_and_names_no_folder_of_this_machine(made, hub):
    folder, expected = made
    adapter = moe_ray.Adapter.from_pretrained(folder / "run")
    with pytest.raises(InputError, match="give base= that model's hub name"):
        adapter.push_to_hub("me/repaired")
    assert hub.files == {}
    adapter.push_to_hub("me/repaired", base="some/base", private=True)
    files = hub.files["me/repaired"]
    assert sorted(files) == ["README.md", "adapter.json", "experts.safetensors"]
    assert not any(str(folder).encode() in data for data in files.values())
    card = files["README.md"].decode()
    assert 'base_model: "some/base"' in card
    assert 'moe_ray.load_repaired("me/repaired")' in card
    assert json.loads(files["adapter.json"])["base"] == "some/base"
    assert torch.equal(logits(moe_ray.load_repaired("me/repaired", model=build("olmoe"))), expected)


def test_another_base_is_refused(made):
    model = build("olmoe")
    with torch.no_grad():
        model.model.layers[0].mlp.experts.down_proj += 1.0
    with pytest.raises(InputError, match="not those it was trained from"):
        moe_ray.load_repaired(made[0] / "run", model=model)


@pytest.mark.parametrize("name", ["./nowhere", "memory://nowhere"])
def test_a_place_without_learned_experts_is_refused(name):
    with pytest.raises(InputError, match=r"holds neither config.yaml nor adapter.json"):
        moe_ray.load_repaired(name)


def test_a_run_that_learned_nothing_names_the_stage(tmp_path):
    RunDirectory.open(str(tmp_path)).write_config(Config())
    with pytest.raises(InputError, match="moe-ray finetune"):
        moe_ray.load_repaired(tmp_path)
