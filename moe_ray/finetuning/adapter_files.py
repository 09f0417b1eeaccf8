"""An adapter's two files, handled without torch: read the header, copy, make local, digest.

`experts.safetensors` holds the experts' weights and `adapter.json`, the header, says what they belong to. The header is
written last, so a folder without one holds no finished adapter.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from fsspec.implementations.local import LocalFileSystem

from moe_ray.config.values import shortened
from moe_ray.errors import InputError
from moe_ray.experts import Expert, Router
from moe_ray.storage.damage import reading
from moe_ray.storage.folder import Folder

ADAPTER_FORMAT, ADAPTER_FORMAT_WITHOUT_ROUTERS = 2, 1
TENSORS, HEADER = "experts.safetensors", "adapter.json"
ADAPTER_FILES = (TENSORS, HEADER)
"""The files of an adapter, in the order in which they are written."""

CURE = "take the folder from where it was made once more, or train again"
_CHUNK = 8 << 20
_MOST_INDICES = 1 << 20
"""Above any layer or expert of a model."""


def read_adapter_header(folder: Folder | str | Path) -> dict[str, Any]:
    """What an adapter says of itself: base model and its hash, layout, experts, routers, mask hash.

    Raises:
        InputError: the folder holds no finished adapter, or one of another format.
    """
    name = folder.url if isinstance(folder, Folder) else str(folder)
    try:
        data = folder.read_bytes(HEADER) if isinstance(folder, Folder) else Path(folder, HEADER).read_bytes()
    except (FileNotFoundError, NotADirectoryError) as error:
        raise InputError(f"{name!r} holds no adapter (no {HEADER}); give a folder written by save_adapter") from error
    with reading(f"{name}/{HEADER}", expected="the JSON header of an adapter", cure=CURE):
        header: dict[str, Any] = json.loads(data)
        if not isinstance(header, dict):
            raise TypeError(f"got {type(header).__name__}")
    known = (ADAPTER_FORMAT_WITHOUT_ROUTERS, ADAPTER_FORMAT)
    if header.get("format") not in known:
        raise InputError(f"{name!r}: got adapter format {shortened(header.get('format'))}, expected one of {known}")
    with reading(f"{name}/{HEADER}", expected="the header of an adapter", cure=CURE):
        _check_fields(header)
    return header


def _check_fields(header: Mapping[str, Any]) -> None:
    for name in ("base", "base_hash", "mask_hash", "model_type"):
        if not isinstance(header[name], str):
            raise TypeError(f"{name} is a {type(header[name]).__name__}")
    types = header.get("dtypes", [])
    if not isinstance(types, list) or not all(isinstance(name, str) for name in types):
        raise TypeError(f"dtypes is {shortened(types)}")
    if not _is_index(header["num_experts"]):
        raise TypeError(f"num_experts is {shortened(header['num_experts'])}")
    layers, experts, routers = header["layers"], header["experts"], header.get("routers", [])
    listed = [*layers, *routers, *(index for pair in experts for index in pair)]
    if not all(map(_is_index, listed)) or any(len(pair) != 2 for pair in experts):
        raise ValueError("layers, experts or routers are no whole numbers")
    parts = parts_of(header)
    strangers = [part for part in parts if part.layer not in layers]
    strangers += [part for part in parts if isinstance(part, Expert) and part.expert >= header["num_experts"]]
    if strangers or len(set(parts)) < len(parts):
        what = f"{strangers[0]}, which no model of its layout has" if strangers else "a part twice"
        raise ValueError(f"it lists {what}")


def _is_index(value: object) -> bool:
    return type(value) is int and 0 <= value < _MOST_INDICES


def _require_tensors(folder: Folder) -> None:
    if not folder.exists(TENSORS):
        raise InputError(f"{folder.url!r} holds {HEADER} without {TENSORS}: the adapter is not whole; {CURE}")


def parts_of(header: Mapping[str, Any]) -> list[Expert | Router]:
    """The experts, and where routers were trained too the routers, that an adapter with this header holds."""
    return [*(Expert(*pair) for pair in header["experts"]), *map(Router, header.get("routers", ()))]


@contextlib.contextmanager
def local_adapter(folder: Folder) -> Iterator[Path]:
    """A local folder with the adapter's files: the folder itself where it is local, else a copy for the context.

    Raises:
        InputError: the folder holds no finished adapter.
    """
    read_adapter_header(folder)
    if isinstance(folder.fs, LocalFileSystem):
        yield Path(folder.path)
        return
    with tempfile.TemporaryDirectory() as path:
        copy_adapter(folder, Folder.open(path))
        yield Path(path)


def copy_adapter(source: Folder, target: Folder) -> None:
    """Copies an adapter between folders on any file systems, in chunks.

    Raises:
        InputError: `source` holds no finished adapter.
    """
    read_adapter_header(source)
    _require_tensors(source)
    # New weights beside an older adapter's header would pass for a finished adapter.
    target.remove(HEADER)
    for name in ADAPTER_FILES:
        temporary = target.file(f".{name}.part")
        with source.fs.open(source.file(name), "rb") as read, target.fs.open(temporary, "wb") as write:
            shutil.copyfileobj(read, write, _CHUNK)
        target.fs.mv(temporary, target.file(name))


def adapter_digest(folder: Folder) -> str:
    """A short hash of the bytes of an adapter's files: equal exactly for equal weights and headers.

    Raises:
        InputError: the folder holds no finished adapter.
    """
    read_adapter_header(folder)
    _require_tensors(folder)
    digest = hashlib.sha256()
    for name in ADAPTER_FILES:
        # The size as well, so that no byte can move from one file's end to the next one's beginning unnoticed.
        digest.update(f"{name} {folder.fs.size(folder.file(name))}\n".encode())
        with folder.fs.open(folder.file(name), "rb") as file:
            while chunk := file.read(_CHUNK):
                digest.update(chunk)
    return digest.hexdigest()[:16]
