"""The files of stages: what they are called, and whether those of a finished one are there as it wrote them."""

from __future__ import annotations

import fnmatch
from collections.abc import Mapping
from typing import Any

from moe_ray.storage.file_digests import changed_files, file_digests
from moe_ray.storage.folder import Folder

_DATA = (".parquet", ".npz", ".safetensors")
"""Endings of the files whose damage nobody would see: what they hold may be read all the same."""
_PARTS, _DIGESTS = "parts", "digests"
_OURS = (
    *("*.json", "*.jsonl", "*.parquet", "*.npz", "*.safetensors", "*.yaml", "*.csv", "*.png", "*.svg", ".*.part"),
    "sft_dataset_*.pkl",
)
"""How the files of unfinished stages are called; a finished one has a list of its own."""


def may_be_a_stages(name: str) -> bool:
    """Whether a file, by its path inside a stage's folder, is called as what stages write."""
    *above, last = name.split("/")
    return "ray_train" in above or any(fnmatch.fnmatchcase(last, pattern) for pattern in _OURS)


def digests_of_data(folder: Folder, manifest: str, *, but: tuple[str, ...] = ()) -> dict[str, dict[str, str]]:
    """Digests of the stage's tables, masks and weights, for its manifest; empty where there are none.

    A stage has them in its folder and in folders inside, where a table is cut into parts. A folder with a manifest is of
    another stage.

    Args:
        folder: of the stage.
        manifest: name of a finished stage's manifest.
        but: folders inside that are left out.
    """
    found: list[str] = []
    for name in folder.names():
        if not folder.fs.isdir(folder.file(name)):
            found.append(name)
        elif name not in but and not folder.exists(f"{name}/{manifest}"):
            found += [f"{name}/{part}" for part in folder.sub(name).names()]
    digests = file_digests(folder, [name for name in found if name.endswith(_DATA)])
    return {_DIGESTS: digests} if digests else {}


def lost_files(folder: Folder, manifest: Mapping[str, Any], may_go: tuple[str, ...]) -> list[str]:
    """What a finished stage wrote and is not there as it wrote it, but for what may go.

    Args:
        folder: of the stage.
        manifest: what its manifest says.
        may_go: patterns of files and folders that may be taken away or changed after the stage is finished.
    """

    def stays(name: str) -> bool:
        return not any(fnmatch.fnmatchcase(name.partition("/")[0], pattern) for pattern in may_go)

    there = set(folder.names())
    lost = [name for name in manifest.get("wrote") or [] if name not in there and stays(name)]
    # What earlier versions wrote has the sizes of parts alone.
    sizes: Mapping[str, int] = manifest.get(_PARTS) or {}
    lost += [name for name, size in sizes.items() if stays(name) and _size(folder, name) != size]
    digests: Mapping[str, str] = manifest.get(_DIGESTS) or {}
    gone = set(lost)
    lost += changed_files(folder, {name: said for name, said in digests.items() if stays(name) and name not in gone})
    return lost


def _size(folder: Folder, name: str) -> int | None:
    try:
        return int(folder.fs.info(folder.file(name))["size"])
    except FileNotFoundError:
        return None
