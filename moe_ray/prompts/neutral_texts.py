"""Neutral text: plain paragraphs on harmless topics, whose loss shows what a repair made the model forget."""

from __future__ import annotations

import json
import re
from importlib import resources
from pathlib import Path

from moe_ray.errors import InputError


def neutral_texts(path: str = "") -> list[str]:
    """The paragraphs of a plain-text file, or those that ship with moe-ray.

    Args:
        path: a UTF-8 file with a blank line between paragraphs; empty = the ones that ship with moe-ray.

    Raises:
        InputError: the file is missing, is not text, or is empty.
    """
    if not path:
        texts: list[str] = json.loads(resources.files(__package__).joinpath("neutral_texts.json").read_text("utf-8"))
        return texts
    try:
        text = Path(path).expanduser().read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"evaluate.neutral_file {path!r} cannot be read as UTF-8 text: {error}") from error
    paragraphs = [paragraph.strip() for paragraph in re.split(r"\n\s*\n", text) if paragraph.strip()]
    if not paragraphs:
        raise InputError(f"evaluate.neutral_file {path!r} has no text; write paragraphs with a blank line between them")
    return paragraphs
