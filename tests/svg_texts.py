"""The texts of a figure."""

from __future__ import annotations

import re


def texts(svg: str) -> list[str]:
    """What is written in an SVG, in the order in which it was drawn."""
    return re.findall(r"<text[^>]*>(.*?)</text>", svg)
