"""Counting, masks, training and adapters over experts that are codes, against a model with the weights they stand for."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from families import SOME_FAMILIES, batch_masks, build, mask, rows, state_of, token_ids
from policies import POLICIES
from quantised_models import METHODS, quantised, twin_of
from removed_experts import KEPT, without_experts
from text_batches import BATCHES, EXPERTS
from word_tokenizer import make_tokenizer

from moe_ray.attribution.weight_attribution import weight_attribution
from moe_ray.config.finetune import FinetuneConfig
from moe_ray.config.model import ModelConfig
from moe_ray.errors import FrozenChanged, InputError
from moe_ray.finetuning.adapter import adapter_applied, apply_adapter
from moe_ray.finetuning.adapter_files import read_adapter_header
from moe_ray.finetuning.fine_tune import continue_fine_tuning, fine_tune
from moe_ray.finetuning.merge import write_repaired
from moe_ray.finetuning.parameter_groups import parameters_of
from moe_ray.models.expert_codes import codes_of
from moe_ray.models.expert_copies import experts_are_copies
from moe_ray.models.expert_storage import storage_of
from moe_ray.models.moe_layers import find_moe_layers
from moe_ray.routing.masking import route_through

pytestmark = pytest.mark.slow

IDS = token_ids(2, 10)
TOLERANCE = 1e-5  # float32, logits of order 5


def tune(model, *, adapter=None, after_step=None, experts=EXPERTS, **settings):
    config = FinetuneConfig(**{"routing": "natural", "epochs": 2, "learning_rate": 1e-2, **settings})
    masks = batch_masks(model, experts)
    return fine_tune(model, make_tokenizer(), BATCHES, masks, config=config, adapter=adapter, after_step=after_step)


def logits_of(model):
    with torch.inference_mode():
        return model(IDS).logits


def learned_in(model):
    return {
        (layer.layer, name, expert)
        for layer in find_moe_layers(model)
        for name, codes in codes_of(layer.experts).items()
        for expert in codes.learned
    }


@pytest.fixture(params=METHODS)
def method(request):
    return request.param


@pytest.mark.parametrize("kept", ["half", "one"])
def test_a_mask_does_what_removing_the_other_experts_does(method, kept):
    model = quantised("olmoe", method)
    mask_LE = mask(model, *KEPT[kept])
    with torch.inference_mode():
        expected = without_experts(twin_of(model, "olmoe"), mask_LE)(IDS).logits
        with route_through(model, mask_LE):
            found = model(IDS).logits
    torch.testing.assert_close(found, expected, atol=TOLERANCE, rtol=0)
    assert not torch.allclose(found, logits_of(model), atol=0.1)


@pytest.mark.parametrize("routing", ["masked", "natural"])
@pytest.mark.parametrize("family", SOME_FAMILIES)
def test_training_learns_what_it_learns_over_plain_weights(method, family, routing):
    model = quantised(family, method)
    twin, before = twin_of(model, family), state_of(model)
    found, expected = tune(model, routing=routing), tune(twin, routing=routing)
    assert found.frozen_parameters_changed == 0
    assert found.trainable_parameters == expected.trainable_parameters
    assert found.total_parameters == expected.total_parameters
    losses = [[report.loss for report in each.reports] for each in (found, expected)]
    assert losses[0] == pytest.approx(losses[1], abs=1e-4)
    assert losses[0][0] > losses[0][-1]
    for name, tensor in model.named_parameters():
        if ".experts.quantised." in name:
            assert torch.equal(tensor, before[name])
    torch.testing.assert_close(logits_of(model), logits_of(twin), atol=1e-3, rtol=0)


def test_activation_checkpointing_gives_the_same_weights(method):
    models = [quantised("olmoe", method) for _ in range(2)]
    for model, switch in zip(models, (False, True), strict=True):
        tune(model, activation_checkpointing=switch)
    torch.testing.assert_close(logits_of(models[0]), logits_of(models[1]), atol=TOLERANCE, rtol=0)


def change_codes(model):
    codes = codes_of(find_moe_layers(model)[0].experts)["down_proj"].codes
    codes.data[1] = codes.data[1].flip(0) + 1  # of an expert that trains


def change_what_lies_over_a_frozen_expert(model):
    codes_of(find_moe_layers(model)[1].experts)["down_proj"].put(7, torch.zeros(24, 12))


@pytest.mark.parametrize("change", [change_codes, change_what_lies_over_a_frozen_expert])
def test_codes_that_change_end_the_training(method, change, tmp_path):
    with pytest.raises(FrozenChanged):
        tune(quantised("olmoe", method), after_step=lambda trainer, _: change(trainer.model), adapter=tmp_path / "a")
    assert not (tmp_path / "a").exists()


def test_an_adapter_gives_a_fresh_model_the_logits_of_the_end_of_training(method, tmp_path):
    model = quantised("olmoe", method)
    tune(model, adapter=tmp_path / "a")
    fresh = quantised("olmoe", method)
    before = logits_of(fresh)
    with adapter_applied(fresh, tmp_path / "a"):
        assert torch.equal(logits_of(fresh), logits_of(model))
        assert not torch.equal(logits_of(fresh), before)
    assert torch.equal(logits_of(fresh), before)
    assert learned_in(fresh) == set()
    apply_adapter(fresh, tmp_path / "a")
    assert torch.equal(logits_of(fresh), logits_of(model))
    assert {(layer, expert) for layer, _, expert in learned_in(fresh)} == {p for each in EXPERTS.values() for p in each}


def test_an_adapter_is_refused_by_bases_that_are_not_quantised_so(method, tmp_path):
    model = quantised("olmoe", method)
    tune(model, adapter=tmp_path / "a")
    assert read_adapter_header(tmp_path / "a")["quantisation"] == method
    with pytest.raises(InputError, match=f"quantised as {method}, got a model with none; load the base with"):
        apply_adapter(build("olmoe"), tmp_path / "a")
    tune(build("olmoe"), adapter=tmp_path / "plain")
    assert "quantisation" not in read_adapter_header(tmp_path / "plain")
    with pytest.raises(InputError, match=f"quantised as none, got a model with {method}"):
        apply_adapter(model, tmp_path / "plain")


def test_an_adapter_is_not_merged_into_a_base_that_it_was_not_learned_over(tmp_path):
    build("olmoe").save_pretrained(tmp_path / "base")
    tune(quantised("olmoe", "int8"), adapter=tmp_path / "a")
    with pytest.raises(InputError, match=r"quantised as int8.*not merged.*model\.quantisation=int8"):
        write_repaired(ModelConfig(path=str(tmp_path / "base"), dtype="float32"), tmp_path / "a", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_second_round_goes_on_from_the_first_and_one_adapter_holds_both(method, tmp_path):
    first = quantised("olmoe", method)
    tune(first, adapter=tmp_path / "first")
    model = quantised("olmoe", method)
    others = {4: [(0, 1), (1, 6)], 6: [(0, 3)]}
    continue_fine_tuning(
        model,
        tmp_path / "first",
        tmp_path / "both",
        batch_masks(model, others),
        lambda folder: tune(model, adapter=folder, experts=others),
        config=FinetuneConfig(),
        saves=True,
    )
    fresh = quantised("olmoe", method)
    apply_adapter(fresh, tmp_path / "both")
    assert torch.equal(logits_of(fresh), logits_of(model))
    assert not torch.equal(logits_of(fresh), logits_of(first))


def test_attribution_by_weights_is_that_of_the_weights_the_codes_stand_for(method):
    model = quantised("olmoe", method)
    row = rows((5, 4))[0]
    found = weight_attribution(model, row, pad_id=0)
    np.testing.assert_allclose(found, weight_attribution(twin_of(model, "olmoe"), row, pad_id=0), rtol=1e-4)
    assert torch.equal(logits_of(model), logits_of(model))


def test_policies_that_were_not_trained_above_run_as_well(method):
    for routing in POLICIES.keys() - {"masked", "natural"}:
        boost = {"boost": 1.0} if routing in ("boosted", "annealed") else {}
        assert tune(quantised("olmoe", method), routing=routing, epochs=1, **boost).frozen_parameters_changed == 0


def test_equal_codes_are_copies_and_others_are_not(method):
    model = quantised("olmoe", method)
    assert not experts_are_copies(model)
    for layer in find_moe_layers(model):
        for codes in codes_of(layer.experts).values():
            for tensor in codes.parameters():
                tensor.data[:] = tensor.data[:1].clone()
    assert experts_are_copies(model)
    storage = storage_of(find_moe_layers(model)[-1])
    storage.write(3, {name: tensor + 1 for name, tensor in storage.read(3).items()})
    assert not experts_are_copies(model)


def test_full_fine_tuning_is_refused():
    with pytest.raises(InputError, match="kept as codes"):
        parameters_of(quantised("olmoe", "int8"), "all")
