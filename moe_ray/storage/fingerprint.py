"""Fingerprints: short hashes of values, tables and checkpoints, and the versions a run was made with."""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import os
import platform
import re
import shlex
import subprocess
import sys
from collections import Counter
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc

from moe_ray.storage.fetched_folder import fetched_folder

_PACKAGES = ("moe-ray", "torch", "transformers", "numpy", "pandas", "pyarrow", "ray", "mlflow")


def content_hash(value: object) -> str:
    """A short hash of plain JSON-able values."""
    text = json.dumps(value, sort_keys=True, ensure_ascii=False, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def frame_hash(frame: pd.DataFrame) -> str:
    """A short hash of a table of plain values: its columns, its rows and their order; the index does not count."""
    rows = pd.util.hash_pandas_object(frame, index=False).to_numpy()
    return hashlib.sha256(repr([str(name) for name in frame.columns]).encode() + rows.tobytes()).hexdigest()[:16]


class TableHash:
    """A short hash of a table that comes in pieces: its columns, its rows and their order, however it is cut."""

    def __init__(self) -> None:
        self._columns: dict[str, tuple[Any, Any]] = {}

    def update(self, table: pa.Table) -> None:
        """Adds the next rows.

        Args:
            table: of text, numbers and truth values, with the columns of the rows before it.
        """
        for name, column in zip(table.column_names, table.columns, strict=True):
            about, values = self._columns.setdefault(name, (hashlib.sha256(), hashlib.sha256()))
            for chunk in column.chunks:
                for digest, buffer in zip((about, values), _plain_buffers(chunk), strict=True):
                    digest.update(buffer)

    def digest(self) -> str:
        """The hash of all rows so far."""
        found = [(name, *(digest.hexdigest() for digest in both)) for name, both in self._columns.items()]
        return content_hash(found)


def _plain_buffers(array: pa.Array) -> tuple[bytes, memoryview]:
    """Lengths of texts, or where numbers are missing; and all values, one after the other."""
    if not (pa.types.is_string(array.type) or pa.types.is_null(array.type)):
        values = array.fill_null(False if pa.types.is_boolean(array.type) else 0).to_numpy(zero_copy_only=False)
        return array.is_null().to_numpy(zero_copy_only=False).tobytes(), memoryview(values.tobytes())
    text = array.cast(pa.string())
    lengths = pc.fill_null(pc.binary_length(text), -1).to_numpy(zero_copy_only=False).astype(np.int32)
    text = text.fill_null("")
    _, offsets, data = text.buffers()
    ends = np.frombuffer(offsets, dtype=np.int32)[text.offset : text.offset + len(text) + 1] if len(text) else [0]
    return lengths.tobytes(), memoryview(b"" if data is None else data)[ends[0] : ends[-1]]


def environment() -> dict[str, Any]:
    """With what a stage was made; every manifest holds it, but no stage depends on it.

    `versions` of packages, `python`, `git_commit`, the `command` without what stands before an @ in an address, the
    `machine` (processors and their kind; GPUs where this process uses torch), and when it `finished` (UTC).
    """
    versions = {}
    for package in _PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return {
        "versions": versions,
        "python": platform.python_version(),
        "git_commit": _git_commit(),
        "command": _command(sys.argv),
        "machine": _machine(),
        "finished": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def _command(arguments: Sequence[str]) -> str:
    """The command line as one would type it; a name or password in an address is not for files that are shared."""
    words = [Path(arguments[0]).name, *arguments[1:]] if arguments else []
    return shlex.join(re.sub(r"://[^/@\s]+@", "://…@", word) for word in words)


def _machine() -> str:
    processors = f"{os.cpu_count()} processors ({platform.machine()})"
    torch = sys.modules.get("torch")
    if torch is None or not torch.cuda.is_available():
        return processors
    gpus = Counter(torch.cuda.get_device_name(number) for number in range(torch.cuda.device_count()))
    return ", ".join([processors, *(f"{number} x {name}" for name, number in gpus.items())])


def _git_commit() -> str | None:
    try:
        # The repository of whatever folder this is may name a program of its own to ask which files have changed.
        command = ["git", "-c", "core.fsmonitor=false", "describe", "--always", "--dirty"]
        done = subprocess.run(command, capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() or None if done.returncode == 0 else None


def hash_checkpoint(path: str, revision: str) -> dict[str, str]:
    """Identifies a checkpoint by named parts, so that a change can be told by the part that changed.

    Of a folder the parts are `model weights`, `tokenizer`, `chat template` and `model configuration` (all other files),
    each a short hash. Of a file above 16 MB only the size and the first and last megabyte count, so that hashing stays
    fast. Of a folder in an object store they are those of its local copy. Of a repository on the hub the parts are its name
    as `model`, and its `model revision`.
    """
    if "://" in path:
        path = str(fetched_folder(path))
    folder = Path(path).expanduser()
    if not folder.is_dir():
        return {"model": path, "model revision": revision}
    parts: dict[str, list[tuple[str, str]]] = {part: [] for part in _CHECKPOINT_PARTS}
    for file in sorted(folder.rglob("*")):
        if not file.is_file():
            continue
        name = file.relative_to(folder).as_posix()
        if name == "tokenizer_config.json":
            settings = json.loads(file.read_text(encoding="utf-8"))
            parts["chat template"].append((name, content_hash(settings.pop("chat_template", None))))
            parts["tokenizer"].append((name, content_hash(settings)))
        else:
            parts[_checkpoint_part(name)].append((name, _hash_ends(file)))
    return {part: content_hash(files) for part, files in parts.items()}


_CHECKPOINT_PARTS = ("model weights", "tokenizer", "chat template", "model configuration")
_TOKENIZER_FILES = ("tokenizer", "vocab", "merges", "added_tokens", "special_tokens", "spiece", "sentencepiece")


def _checkpoint_part(name: str) -> str:
    if name.endswith((".safetensors", ".safetensors.index.json", ".bin", ".bin.index.json")):
        return "model weights"
    if name.startswith(("chat_template", "additional_chat_templates/")):
        return "chat template"
    return "tokenizer" if name.startswith(_TOKENIZER_FILES) else "model configuration"


def _hash_ends(file: Path) -> str:
    size = file.stat().st_size
    with file.open("rb") as stream:
        if size <= 16 << 20:
            return hashlib.sha256(stream.read()).hexdigest()
        head = stream.read(1 << 20)
        stream.seek(-(1 << 20), 2)
        return hashlib.sha256(head + stream.read() + str(size).encode()).hexdigest()
