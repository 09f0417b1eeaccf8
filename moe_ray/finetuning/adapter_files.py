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
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from fsspec.implementations.local import LocalFileSystem

from moe_ray.errors import InputError
from moe_ray.storage.damage import reading
from moe_ray.storage.folder import Folder

ADAPTER_FORMAT = 1
TENSORS, HEADER = "experts.safetensors", "adapter.json"
ADAPTER_FILES = (TENSORS, HEADER)
"""The files of an adapter, in the order in which they are written."""

CURE = "take the folder from where it was made once more, or train again"
_CHUNK = 8 << 20


def read_adapter_header(folder: Folder | str | Path) -> dict[str, Any]:
    """What an adapter says of itself: base model and its hash, layout, experts, mask hash.

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
    if header.get("format") != ADAPTER_FORMAT:
        raise InputError(f"{name!r}: got adapter format {header.get('format')}, expected {ADAPTER_FORMAT}")
    return header


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
    digest = hashlib.sha256()
    for name in ADAPTER_FILES:
        # The size as well, so that no byte can move from one file's end to the next one's beginning unnoticed.
        digest.update(f"{name} {folder.fs.size(folder.file(name))}\n".encode())
        with folder.fs.open(folder.file(name), "rb") as file:
            while chunk := file.read(_CHUNK):
                digest.update(chunk)
    return digest.hexdigest()[:16]
