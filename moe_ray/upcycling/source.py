"""Where a dense model comes from, and what an upcycle leaves beside it; known without loading either."""

from __future__ import annotations

import os
import re
from pathlib import Path

from moe_ray.errors import InputError

ARCHIVE_SUFFIXES = (".whl", ".zip")
GGUF_SUFFIX = ".gguf"
RECORD = "upcycle.json"
"""The file of an upcycle that says what it was made of."""


def existing(source: str | Path) -> Path:
    """Returns ``source`` as a path; only a hub name, ``name`` or ``owner/name``, may have nothing there.

    Raises:
        InputError: ``source`` is not a hub name and nothing is there.
    """
    path, text = Path(source), os.fspath(source)
    is_hub_name = re.fullmatch(r"\w[\w.-]*(/\w[\w.-]*)?", text) and path.suffix not in (GGUF_SUFFIX, *ARCHIVE_SUFFIXES)
    if not path.exists() and not is_hub_name:
        raise InputError(f"source: nothing at {text}; give a checkpoint folder, a .gguf file, a .whl or a hub name")
    return path
