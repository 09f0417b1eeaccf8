"""Masks are stored twice, for programs and for people, and read only where the two agree."""

import numpy as np
import pytest

from moe_ray.errors import InputError
from moe_ray.experts import Expert, masks_from_experts
from moe_ray.identification.mask_files import read_masks, write_masks
from moe_ray.storage.folder import Folder


@pytest.fixture(params=["local", "memory"])
def folder(request, tmp_path):
    return Folder.open(str(tmp_path / "run") if request.param == "local" else f"memory://{tmp_path.name}/run")


def test_masks_survive_being_stored_by_batch(folder):
    selected = {5: (Expert(2, 1), Expert(1, 0)), 2: (Expert(5, 7),), 9: ()}
    masks = masks_from_experts(selected, layers=(1, 2, 5), num_experts=8)
    write_masks(folder, masks)
    got = read_masks(folder)
    assert got.digest() == masks.digest()
    assert got.selected == selected
    assert np.array_equal(got[2], masks[2])


def test_masks_that_disagree_with_their_lists_are_refused(folder):
    write_masks(folder, masks_from_experts({0: (Expert(0, 1),)}, layers=(0,), num_experts=4))
    folder.write_json("unsafe_experts.json", {"0": [[0, 2]]})
    with pytest.raises(InputError, match="disagree"):
        read_masks(folder)
