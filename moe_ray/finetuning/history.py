"""The history of a training: one JSON line per step."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from moe_ray.storage.folder import Folder

HISTORY = "history.jsonl"


def write_history(folder: Folder, lines: Sequence[Mapping[str, Any]]) -> None:
    """Writes step reports as JSON lines."""
    folder.write_bytes(HISTORY, "".join(f"{json.dumps(line)}\n" for line in lines).encode())


def read_history(folder: Folder) -> list[dict[str, Any]]:
    """The step reports of a training run, in order."""
    return [json.loads(line) for line in folder.read_bytes(HISTORY).decode().splitlines()]
