"""Abliteration: nothing writes along the direction any more, and afterwards every bit is back."""

from __future__ import annotations

import pytest
import torch
from families import build

from moe_ray.attacks.abliteration import Contrast, abliterated, residual_writers
from moe_ray.errors import InputError
from moe_ray.models.token_budget import TokenBudget
from moe_ray.models.tokenization import TokenizedRow

pytestmark = pytest.mark.slow

FAMILIES = ["olmoe", "mixtral", "qwen3_moe", "deepseek_v3", "gpt_oss"]
CONTRAST = Contrast(
    unsafe=[TokenizedRow([5, 6, 7 + n % 3], [8, 9, 2]) for n in range(4)],
    safe=[TokenizedRow([9, 6, 5, n % 3], [7, 2]) for n in range(4)],
)


def state_of(model):
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def attack(model, contrast=CONTRAST):
    return abliterated(model, contrast, budget=TokenBudget(64), pad_id=0)


def residuals(model, ids):
    with torch.inference_mode():
        return model.base_model(torch.tensor([ids]), output_hidden_states=True, use_cache=False).hidden_states[:-1]


@pytest.mark.parametrize("family", FAMILIES)
def test_no_writer_has_a_component_along_the_direction(family, monkeypatch):
    model, removed = build(family), []
    writer_type = type(residual_writers(model)[0])
    original = writer_type.remove

    def remove(self, direction):
        removed.append(direction)
        original(self, direction)

    monkeypatch.setattr(writer_type, "remove", remove)
    with attack(model):
        direction = removed[-1]
        assert float(direction.norm()) == pytest.approx(1)
        for writer in residual_writers(model):
            size = float(writer.tensor.detach().float().norm())
            assert float(writer.component(direction).abs().max()) <= 1e-5 * max(1.0, size), writer.name
        for hidden in residuals(model, [5, 6, 7, 8]):
            assert float((hidden.double() @ direction).abs().max() / hidden.norm()) < 1e-5


@pytest.mark.parametrize("family", FAMILIES)
def test_all_weights_are_back_bit_for_bit(family):
    model = build(family)
    before = state_of(model)
    with attack(model) as notes:
        assert notes["layer"] >= 1
        changed = {name for name, tensor in model.state_dict().items() if not torch.equal(tensor, before[name])}
        assert any("embed" in name for name in changed)
        assert any("down_proj" in name or "w2" in name for name in changed)
        assert any("o_proj" in name for name in changed)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_they_are_back_after_an_error_too():
    model = build("olmoe")
    before = state_of(model)
    with pytest.raises(KeyError), attack(model):
        raise KeyError
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_only_what_writes_into_the_residual_changes():
    model = build("olmoe")
    before, writers = state_of(model), {id(writer.tensor) for writer in residual_writers(model)}
    with attack(model):
        for name, parameter in model.named_parameters():
            if id(parameter) not in writers:
                assert torch.equal(parameter, before[name]), name


def test_a_writer_that_is_not_known_is_noticed():
    model = build("olmoe")
    attention = model.model.layers[0].self_attn
    attention.of_another_name = attention.o_proj
    del attention.o_proj
    attention.o_proj = torch.nn.Sequential(attention.of_another_name)
    with pytest.raises(InputError, match="writes there in a way that moe-ray does not know"), attack(model):
        pass


def test_prompts_of_one_label_are_refused():
    with (
        pytest.raises(InputError, match="prompts of one label only"),
        attack(build("olmoe"), Contrast(unsafe=CONTRAST.unsafe, safe=[])),
    ):
        pass
