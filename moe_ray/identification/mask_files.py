"""Expert masks as files: an array for programs and expert lists for people, which must agree."""

from __future__ import annotations

import io
import json
import zipfile

import numpy as np

from moe_ray.errors import InputError
from moe_ray.experts import Expert, ExpertMasks, masks_from_experts
from moe_ray.storage.damage import reading
from moe_ray.storage.folder import Folder

MASKS, UNSAFE_EXPERTS = "masks.npz", "unsafe_experts.json"

_CURE = "run the identify stage again"
_MOST_LAYERS, _MOST_EXPERTS = 1 << 10, 1 << 14
"""Many times those of the largest model there is."""


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
        InputError: they do not, or one is damaged.
    """
    lists = folder.read_json(UNSAFE_EXPERTS)
    with reading(folder.file(UNSAFE_EXPERTS), expected="for every batch a list of (layer, expert)", cure=_CURE):
        selected = {int(batch): tuple(_expert(*pair) for pair in experts) for batch, experts in lists.items()}
    data = folder.read_bytes(MASKS)
    with reading(folder.file(MASKS), expected="arrays batch_idx, layers and masks", cure=_CURE):
        _check_sizes(data, num_batches=len(selected))
        stored = np.load(io.BytesIO(data), allow_pickle=False)
        layers, num_experts = stored["layers"].tolist(), stored["masks"].shape[2]
        masks = masks_from_experts(selected, layers=layers, num_experts=num_experts)
        agree = masks.batch_idx == tuple(stored["batch_idx"].tolist()) and np.array_equal(
            masks.masks_BLE, stored["masks"]
        )
    if not agree:
        raise InputError(f"{MASKS} and {UNSAFE_EXPERTS} in {folder.url} disagree; run the identify stage again")
    return masks


def _expert(layer: int, expert: int) -> Expert:
    if type(layer) is not int or type(expert) is not int or layer < 0 or expert < 0:
        raise ValueError(f"got the expert {[layer, expert]}")
    return Expert(layer, expert)


def _check_sizes(data: bytes, *, num_batches: int) -> None:
    """Refuses arrays by their headers, before they are unpacked: a few bytes can claim gigabytes."""
    shapes = {}
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        for name in archive.namelist():
            with archive.open(name) as file:
                version = np.lib.format.read_magic(file)
                read_header = (
                    np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
                )
                shapes[name], _, dtype = read_header(file)
            if dtype.hasobject:
                raise ValueError(f"{name} is an array of pickled objects")
    batches, layers, experts = shapes["masks.npy"]
    if (batches,) != shapes["batch_idx.npy"] or (layers,) != shapes["layers.npy"] or batches != num_batches:
        raise ValueError(f"got masks of shape {shapes['masks.npy']} for {num_batches} batches")
    if layers > _MOST_LAYERS or experts > _MOST_EXPERTS:
        raise ValueError(f"got masks of shape {shapes['masks.npy']}, which no model has")
