"""Whole numbers of a released `config.json` are read as floats where transformers takes floats alone, and only there."""

from __future__ import annotations

import copy
import json

import pytest
import torch
from families import build, token_ids
from huggingface_hub.errors import StrictDataclassError
from moe_families import FAMILIES, tiny_model
from transformers import CONFIG_MAPPING, AutoConfig, DbrxConfig, MixtralConfig

from moe_ray.config.model import ModelConfig
from moe_ray.errors import InputError
from moe_ray.models.loading import check_model, load_model, num_decoder_layers
from moe_ray.models.whole_numbers import from_pretrained, with_floats


def whole(value):
    """The value as JSON without decimal points: floats that are whole numbers become them."""
    if isinstance(value, dict):
        return {key: whole(item) for key, item in value.items()}
    return int(value) if isinstance(value, float) and value.is_integer() else value


def written(folder, fields):
    (folder / "config.json").write_text(json.dumps(fields))
    return str(folder)


def test_a_whole_number_is_read_where_only_a_float_is_taken(tmp_path):
    path = written(tmp_path, {"model_type": "dbrx", "ffn_config": {"moe_normalize_expert_weights": 1}})
    with pytest.raises(StrictDataclassError):
        AutoConfig.from_pretrained(path)
    weight = from_pretrained(AutoConfig, path).ffn_config.moe_normalize_expert_weights
    assert (weight, type(weight)) == (1.0, float)


def test_other_fields_stay_as_they_are():
    fields = {"moe_top_k": 4, "moe_jitter_eps": 0, "moe_loss_weight": 1, "unknown": 1, "moe_num_experts": True}
    mended = with_floats(DbrxConfig, {"ffn_config": fields, "n_layers": 2, "resid_pdrop": 0, "attn_config": None})
    assert repr(mended["ffn_config"]) == repr(fields | {"moe_loss_weight": 1.0})
    assert repr(mended["n_layers"]) == "2"
    assert repr(mended["resid_pdrop"]) == "0.0"
    assert mended["attn_config"] is None
    assert with_floats(MixtralConfig, {"router_aux_loss_coef": "1"}) == {"router_aux_loss_coef": "1"}


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_reads_its_defaults_written_without_decimal_points(family, tmp_path):
    kind = CONFIG_MAPPING[family]
    fields = kind().to_diff_dict() | {"model_type": family, "initializer_range": 1.0}
    path = written(tmp_path, whole(fields))
    assert from_pretrained(AutoConfig, path).to_dict() == kind.from_dict(fields, name_or_path=path).to_dict()


@pytest.mark.slow
def test_a_checkpoint_in_that_form_is_found_and_loaded_with_its_weights(tmp_path):
    model = copy.deepcopy(tiny_model("dbrx")).float()
    model.save_pretrained(tmp_path)
    fields = json.loads((tmp_path / "config.json").read_text())
    fields["ffn_config"]["moe_normalize_expert_weights"] = 1
    config = ModelConfig(path=written(tmp_path, fields), dtype="float32")
    assert len(check_model(config)) == num_decoder_layers(config) == 4
    ids = token_ids(2, 7)
    with torch.inference_mode():
        assert torch.equal(load_model(config, device="cpu")(ids).logits, model(ids).logits)


def test_a_number_that_stays_of_a_wrong_type_is_named_with_what_is_expected(tmp_path):
    fields = build("mixtral").config.to_dict() | {"router_aux_loss_coef": "much"}
    with pytest.raises(InputError, match=r"'router_aux_loss_coef' expected float, got str \(value: 'much'\); give a"):
        check_model(ModelConfig(path=written(tmp_path, fields)))
