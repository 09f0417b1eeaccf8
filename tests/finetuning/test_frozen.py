"""What is frozen is hashed: a change outside the union is noticed, one inside is not (invariant 10)."""

from __future__ import annotations

import pytest
import torch
from families import NUM_EXPERTS, build, mask

from moe_ray.finetuning.frozen import count_changed, hash_frozen
from moe_ray.models.moe_layers import find_moe_layers

UNION = ((0, 2, 3, 5, 7), (0, 1, 4, 6))


@pytest.mark.parametrize(
    ("name", "index"),
    [
        ("model.layers.0.mlp.gate.weight", (2, 3)),
        ("lm_head.weight", (0, 0)),
        ("model.layers.1.mlp.experts.down_proj", (2, 0, 0)),
    ],
)
def test_one_changed_number_outside_the_union_is_noticed(name, index):
    model = build("olmoe")
    union_LE = mask(model, *UNION)
    before = hash_frozen(model, union_LE)
    with torch.no_grad():
        model.get_parameter(name)[index] += 1e-3
    assert count_changed(before, hash_frozen(model, union_LE)) > 0


def test_a_changed_correction_bias_is_noticed():
    model = build("deepseek_v3")
    union_LE = mask(model, *UNION)
    before = hash_frozen(model, union_LE)
    find_moe_layers(model)[0].selection_biases()[0][3] += 1e-3
    assert count_changed(before, hash_frozen(model, union_LE)) == NUM_EXPERTS


def test_changes_inside_the_union_do_not_count():
    model = build("olmoe")
    union_LE = mask(model, *UNION)
    before = hash_frozen(model, union_LE)
    with torch.no_grad():
        model.model.layers[0].mlp.experts.down_proj[7] += 1.0
    assert count_changed(before, hash_frozen(model, union_LE)) == 0
