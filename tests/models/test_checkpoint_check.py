"""Weights of another model than the configuration describes are refused by the heads of their files."""

import json

import pytest
import torch
from families import build
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM

from moe_ray.config.model import ModelConfig
from moe_ray.errors import InputError
from moe_ray.models.checkpoint_check import check_shapes
from moe_ray.models.loading import check_model

pytestmark = pytest.mark.slow


@pytest.fixture
def checkpoint(tmp_path):
    build("olmoe").save_pretrained(tmp_path)
    return tmp_path


def test_a_checkpoint_as_it_was_saved_is_accepted(checkpoint):
    check_model(ModelConfig(path=str(checkpoint)))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"vocab_size": 7}, r"such as lm_head\.weight: got shape \(\d+, \d+\), expected \(7, \d+\)"),
        ({"hidden_size": 8}, r"got shape \(\d+, \d+\), expected"),
    ],
)
def test_a_configuration_of_another_size_is_named(checkpoint, change, said):
    config = json.loads((checkpoint / "config.json").read_text())
    (checkpoint / "config.json").write_text(json.dumps(config | change))
    with pytest.raises(InputError, match=said):
        check_model(ModelConfig(path=str(checkpoint)))


def test_quantised_weights_have_forms_of_their_own(checkpoint):
    tensors = load_file(checkpoint / "model.safetensors")
    save_file(tensors | {"model.norm.weight": torch.zeros(3)}, checkpoint / "model.safetensors")
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(checkpoint))
    with pytest.raises(InputError, match=r"model\.norm\.weight: got shape \(3,\)"):
        check_shapes(model, checkpoint)
    model.config.quantization_config = {"quant_method": "other"}
    check_shapes(model, checkpoint)
