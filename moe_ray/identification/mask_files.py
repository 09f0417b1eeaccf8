"""Expert masks as files: an array for programs and expert lists for people, which must agree."""

from __future__ import annotations

import io
import json

import numpy as np

from moe_ray.errors import InputError
from moe_ray.experts import Expert, ExpertMasks, masks_from_experts
from moe_ray.storage.folder import Folder

MASKS, UNSAFE_EXPERTS = "masks.npz", "unsafe_experts.json"


def write_masks(folder: Folder, masks: ExpertMasks) -> None:
    """Writes `masks.npz` (`batch_idx`, `layers`, `masks` of shape (batches, layers, experts)) and `unsafe_experts.json`."""
    buffer = io.BytesIO()
    np.savez_compressed(
        buffer, batch_idx=np.asarray(masks.batch_idx), layers=np.asarray(masks.layers), masks=masks.masks_BLE
    )
    folder.write_bytes(MASKS, buffer.getvalue())
    # A line per batch: indented JSON is written and read several times slower, and has four lines for each expert.
    lines = [
        f' "{batch}": {json.dumps([list(expert) for expert in experts])}' for batch, experts in masks.selected.items()
    ]
    folder.write_bytes(UNSAFE_EXPERTS, ("{\n" + ",\n".join(lines) + "\n}\n").encode())


def read_masks(folder: Folder) -> ExpertMasks:
    """The masks that `write_masks` wrote; both files must agree.

    Raises:
        InputError: they do not.
    """
    stored = np.load(io.BytesIO(folder.read_bytes(MASKS)), allow_pickle=False)
    lists = folder.read_json(UNSAFE_EXPERTS)
    masks = masks_from_experts(
        {int(batch): tuple(map(Expert._make, experts)) for batch, experts in lists.items()},
        layers=stored["layers"].tolist(),
        num_experts=stored["masks"].shape[2],
    )
    if masks.batch_idx != tuple(stored["batch_idx"].tolist()) or not np.array_equal(masks.masks_BLE, stored["masks"]):
        raise InputError(f"{MASKS} and {UNSAFE_EXPERTS} in {folder.url} disagree; run the identify stage again")
    return masks
