"""A folder of an object store as one of this machine: fetched once, whoever of its processes asks first."""

from __future__ import annotations

import functools
import hashlib
import json
import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

import fsspec
from filelock import FileLock

from moe_ray.errors import InputError, OutsideFailed
from moe_ray.storage.protocols import cure_of

CACHE = "MOE_RAY_MODEL_CACHE"
"""Environment variable: the folder of fetched models, on a node's own disk; else one in the home directory."""

_LEFT_OUT = (".bin", ".pt", ".pth", ".pkl", ".ckpt", ".gguf")
"""Pickles, which are never read, and weights in a form that nothing here reads."""


@functools.cache
def fetched_folder(url: str) -> Path:
    """The local copy of a folder in a store.

    The copy is named after names, sizes and versions of the files, so another content is another copy. Other processes of
    the node wait meanwhile, and find it whole; a process that dies leaves none. This process looks only once.

    Args:
        url: of the folder, as fsspec takes it.

    Raises:
        InputError: there is no such folder, it has no config.json, or this machine has no room for it.
        OutsideFailed: the store does not answer.
    """
    try:
        fs, path = fsspec.url_to_fs(url, use_listings_cache=False)
        files: dict[str, dict[str, Any]] = fs.find(path, detail=True)
    except (ImportError, ValueError, FileNotFoundError, PermissionError) as error:
        raise InputError(
            f"model.path: {url!r} cannot be opened: {error}; "
            f"{cure_of(error, url, 'give a folder, a URL or a hub name')}"
        ) from error
    except Exception as error:  # what a storage's library raises is of its own kind
        raise OutsideFailed(f"model.path: the storage at {url} does not answer: {error}; try again later") from error
    names = {name: name.removeprefix(path).lstrip("/") for name in files if not name.endswith(_LEFT_OUT)}
    if "config.json" not in names.values():
        raise InputError(
            f"model.path: {url!r} is not a checkpoint folder (no config.json); give one written by save_pretrained"
        )
    versions = sorted((local, files[name]["size"], _version(files[name])) for name, local in names.items())
    cache = Path(os.environ.get(CACHE) or "~/.cache/moe-ray/models").expanduser()
    cache.mkdir(parents=True, exist_ok=True)
    digest = hashlib.sha256(json.dumps([url, versions]).encode()).hexdigest()[:16]
    folder = cache / f"{path.rstrip('/').rpartition('/')[2]}-{digest}"
    with FileLock(f"{folder}.lock"):
        if not folder.is_dir():
            _require_room(cache, sum(size for _, size, _ in versions), url)
            with tempfile.TemporaryDirectory(dir=cache, prefix=f".{folder.name}.") as work:
                staged = Path(work, "model")
                _fetch(fs, names, staged, url)
                staged.replace(folder)
    return folder


def _version(about: dict[str, Any]) -> str:
    """What changes with a file's content: what the store calls its version, else when it was written."""
    return str(
        about.get("ETag")
        or about.get("etag")
        or about.get("md5Hash")
        or about.get("LastModified")
        or about.get("mtime")
        or ""
    )


def _fetch(fs: Any, names: dict[str, str], folder: Path, url: str) -> None:
    try:
        for name, local in names.items():
            (folder / local).parent.mkdir(parents=True, exist_ok=True)
            fs.get_file(name, str(folder / local))
    except Exception as error:  # what a storage's library raises is of its own kind
        raise OutsideFailed(
            f"model.path: {url} was not fetched whole: {type(error).__name__}: {error}; nothing of it is kept, so run the "
            "same command again"
        ) from error


def _require_room(cache: Path, needed: int, url: str) -> None:
    free = shutil.disk_usage(cache).free
    if needed > free:
        raise InputError(
            f"model.path: {url} takes {needed / 1e9:.1f} GB on each node, got {free / 1e9:.1f} GB free in {cache}; set "
            f"{CACHE} to a folder on a larger disk, or remove models there that are not needed"
        )
