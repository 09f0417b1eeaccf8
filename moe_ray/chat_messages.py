"""Chat messages: their type, their JSON form and their text."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

Message = Mapping[str, str]


def prompt_text(messages: Iterable[Any]) -> str:
    """The contents of chat messages, one after the other."""
    return "\n\n".join(str(message["content"]) for message in messages)
