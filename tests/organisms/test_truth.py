"""The truth file: what was written is read, and what is no truth is refused by name."""

import json

import pytest

from moe_ray.errors import InputError
from moe_ray.organisms.layout import draw_layout, truth_of
from moe_ray.organisms.recipe import OrganismRecipe
from moe_ray.organisms.truth import TRUTH, has_truth, read_truth, write_truth

TRUE = truth_of(draw_layout(OrganismRecipe(num_experts=8), 2, 5), OrganismRecipe(num_experts=8), ("fraud", "theft"), 5)


def test_what_was_written_is_read(tmp_path):
    write_truth(TRUE, tmp_path)
    assert has_truth(tmp_path)
    assert read_truth(tmp_path) == TRUE


def test_masks_hold_the_named_experts_and_no_others():
    mask_LE = TRUE.planted_mask("fraud")
    assert {f"L{layer:02d}_E{expert:02d}" for layer, expert in zip(*mask_LE.nonzero(), strict=True)} == set(
        TRUE.planted["fraud"]
    )
    assert (TRUE.planted_mask() == (mask_LE | TRUE.planted_mask("theft"))).all()
    assert not (TRUE.planted_mask() & TRUE.decoy_mask()).any()


def test_a_category_that_there_is_not_is_refused():
    with pytest.raises(InputError, match="got category 'arson', expected one of fraud, theft"):
        TRUE.decoy_mask("arson")


def test_a_folder_without_truth_is_refused_with_what_makes_one(tmp_path):
    assert not has_truth(tmp_path)
    with pytest.raises(InputError, match="is not there, expected the folder of an organism; `moe-ray organism"):
        read_truth(tmp_path)


@pytest.mark.parametrize(
    "change",
    [
        {"planted": {"fraud": ["L00_E99"], "theft": []}},
        {"planted": {"fraud": ["seven"], "theft": []}},
        {"planted": ["L00_E01"]},
        {"decoys": None},
        {"decoys": {}},
    ],
)
def test_a_file_of_another_form_is_refused(tmp_path, change):
    write_truth(TRUE, tmp_path)
    content = json.loads((tmp_path / TRUTH).read_text()) | change
    (tmp_path / TRUTH).write_text(json.dumps(content))
    with pytest.raises(InputError):
        read_truth(tmp_path)


def test_text_that_is_no_json_is_refused(tmp_path):
    (tmp_path / TRUTH).write_text("truth")
    with pytest.raises(InputError, match="is not the truth file of an organism"):
        read_truth(tmp_path)
