"""Mask files that are damaged, foreign or claim to be huge."""

from __future__ import annotations

import io
import zipfile

import numpy as np
import pytest
from damage import damaged, of_other_types, refusal_of
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from moe_ray.errors import InputError
from moe_ray.experts import Expert, masks_from_experts
from moe_ray.identification.mask_files import MASKS, UNSAFE_EXPERTS, read_masks, write_masks
from moe_ray.storage.folder import Folder

WHOLE = masks_from_experts({3: (Expert(0, 1), Expert(2, 5)), 7: (Expert(2, 0),), 9: ()}, layers=(0, 2), num_experts=6)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return Folder.open(str(tmp_path_factory.mktemp("masks")))


@pytest.mark.slow
@settings(max_examples=200, suppress_health_check=list(HealthCheck), database=None)
@given(st.data())
def test_damage_is_refused_with_the_name_of_the_file_or_the_masks_are_the_same(folder, data):
    write_masks(folder, WHOLE)
    name = data.draw(st.sampled_from([MASKS, UNSAFE_EXPERTS]))
    whole = folder.read_bytes(name)
    damage = damaged(whole) if name == MASKS else st.one_of(damaged(whole), of_other_types(whole))
    folder.write_bytes(name, data.draw(damage))
    said = refusal_of(lambda: read_masks(folder))
    if said is None:
        assert read_masks(folder).digest() == WHOLE.digest()
    else:
        assert MASKS in said or UNSAFE_EXPERTS in said
        assert len(said) < 1000


@pytest.mark.parametrize("shape", [(3, 2, 1 << 40), (3, 1 << 20, 6), (1 << 40, 2, 6)])
def test_masks_that_claim_more_than_they_hold_are_refused_by_their_header(folder, shape):
    write_masks(folder, WHOLE)
    header = io.BytesIO()
    np.lib.format.write_array_header_1_0(header, {"descr": "|b1", "fortran_order": False, "shape": shape})
    stored = np.load(io.BytesIO(folder.read_bytes(MASKS)))
    made = io.BytesIO()
    with zipfile.ZipFile(made, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("masks.npy", header.getvalue() + b"\0" * 1000)
        for name in ("batch_idx", "layers"):
            array = io.BytesIO()
            np.save(array, stored[name])
            archive.writestr(f"{name}.npy", array.getvalue())
    folder.write_bytes(MASKS, made.getvalue())
    with pytest.raises(InputError, match=r"masks\.npz is damaged or foreign: ValueError: got masks of shape"):
        read_masks(folder)
