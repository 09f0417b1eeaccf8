"""Fingerprints: short hashes of values, tables and checkpoints, and the versions a run was made with."""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import platform
import subprocess
from pathlib import Path
from typing import Any

import pandas as pd

_PACKAGES = ("moe-ray", "torch", "transformers", "numpy", "pandas", "pyarrow", "ray", "mlflow")


def content_hash(value: object) -> str:
    """A short hash of plain JSON-able values."""
    text = json.dumps(value, sort_keys=True, ensure_ascii=False, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def frame_hash(frame: pd.DataFrame) -> str:
    """A short hash of a table of plain values: its columns, its rows and their order; the index does not count."""
    rows = pd.util.hash_pandas_object(frame, index=False).to_numpy()
    return hashlib.sha256(repr([str(name) for name in frame.columns]).encode() + rows.tobytes()).hexdigest()[:16]


def environment() -> dict[str, Any]:
    """Versions of packages and Python, and the git commit; every manifest holds them, but no stage depends on them."""
    versions = {}
    for package in _PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return {"versions": versions, "python": platform.python_version(), "git_commit": _git_commit()}


def _git_commit() -> str | None:
    try:
        done = subprocess.run(["git", "describe", "--always", "--dirty"], capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() or None if done.returncode == 0 else None


def hash_checkpoint(path: str, revision: str) -> dict[str, str]:
    """Identifies a checkpoint by named parts, so that a change can be told by the part that changed.

    Of a folder the parts are `model weights`, `tokenizer`, `chat template` and `model configuration` (all other files),
    each a short hash. Of a file above 16 MB only the size and the first and last megabyte count, so that hashing stays
    fast. Of a repository on the hub the parts are its name as `model`, and its `model revision`.
    """
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
