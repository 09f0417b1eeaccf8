"""Untrusted text made safe to print."""

from __future__ import annotations


def printable(text: str) -> str:
    """Untrusted text on one line without control characters, so that it cannot steer a terminal."""
    return "".join(character if character.isprintable() else "\N{REPLACEMENT CHARACTER}" for character in text)


def printable_lines(text: str) -> str:
    """Untrusted text without control characters other than line ends."""
    return "\n".join(printable(line) for line in text.splitlines())
