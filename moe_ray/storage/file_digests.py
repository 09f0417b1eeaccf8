"""Digests of stored files, by which a lost or changed one is noticed when it is to be used again."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor

from fsspec.implementations.local import LocalFileSystem

from moe_ray.storage.folder import Folder

_CHUNK = 8 << 20
_THREADS = 4


def file_digests(folder: Folder, names: Iterable[str]) -> dict[str, str]:
    """A short text per file that changes with its bytes; a file that is not there has none.

    On a disk it is a hash of the bytes, some 0.7 s per GB. An object store keeps one of its own, the entity tag, and checks
    what it stores against it; there nothing is read.

    Args:
        folder: of the files.
        names: of the files.
    """
    wanted = list(names)
    with ThreadPoolExecutor(_THREADS) as pool:
        found = pool.map(lambda name: _digest(folder, name), wanted)
        return {name: digest for name, digest in zip(wanted, found, strict=True) if digest}


def changed_files(folder: Folder, digests: Mapping[str, str]) -> list[str]:
    """The files that are lost or have other bytes than when their digests were taken.

    Args:
        folder: of the files.
        digests: from `file_digests`.
    """
    now = file_digests(folder, digests)
    return [name for name, digest in digests.items() if now.get(name) != digest]


def _digest(folder: Folder, name: str) -> str:
    path = folder.file(name)
    try:
        if not isinstance(folder.fs, LocalFileSystem) and (tag := folder.fs.info(path).get("ETag")):
            return f"tag {tag.strip(chr(34))}"
        digest = hashlib.sha256()
        with folder.fs.open(path, "rb") as file:
            while chunk := file.read(_CHUNK):
                digest.update(chunk)
    except FileNotFoundError:
        return ""
    return digest.hexdigest()[:16]
