"""Matplotlib figures as SVG that can stand many on one page.

Text stays text, so it is small, sharp and can be searched; every id carries the figure's name, since those that matplotlib
gives repeat from figure to figure. Nothing in the file points outside of it.
"""

from __future__ import annotations

import io
import re
import textwrap
import warnings
import xml.etree.ElementTree as ET
from collections.abc import Callable
from typing import Any

import matplotlib
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure

from moe_ray.report.printable import printable

_SVG, _XLINK = "http://www.w3.org/2000/svg", "http://www.w3.org/1999/xlink"

_STYLE = {
    "svg.fonttype": "none",
    "text.parse_math": False,
    "font.size": 10.0,
    "font.family": "sans-serif",
    "axes.titlesize": 10.0,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "image.composite_image": False,
    "hatch.linewidth": 0.6,
}

_LONGEST_LABEL = 24


def draw(name: str, title: str, plot: Callable[[Figure], None], *, width: float = 5.4, height: float = 3.4) -> str:
    """The figure that `plot` draws, as SVG text.

    Args:
        name: of the figure on its page; starts every id.
        title: what it shows, for those who cannot see it.
        plot: draws on an empty figure.
        width: in inches; the page scales it.
        height: in inches.
    """
    with matplotlib.rc_context({**_STYLE, "svg.hashsalt": name}), warnings.catch_warnings():
        # Labels may hold any script; the reader's own fonts draw them, matplotlib's only measure.
        warnings.filterwarnings("ignore", message="Glyph")
        figure = Figure(figsize=(width, height), layout="constrained")
        FigureCanvasSVG(figure)
        plot(figure)
        buffer = io.StringIO()
        nothing: Any = dict.fromkeys(("Date", "Creator", "Format", "Type"))
        figure.savefig(buffer, format="svg", metadata=nothing, transparent=True)
    return _with_unique_ids(buffer.getvalue(), name, title)


def with_size(svg: str) -> str:
    """The figure as a file of its own: the page scales it, but whatever shows a file needs its width and height."""
    found = re.search(r'viewBox="[\d.]+ [\d.]+ ([\d.]+) ([\d.]+)"', svg)
    if found is None:
        return svg
    width, height = found.groups()
    return svg.replace("<svg", f'<svg width="{width}pt" height="{height}pt"', 1)


def label(text: str, *, lines: int = 1) -> str:
    """Untrusted text as a label: without control characters, on at most so many lines, and not too long."""
    clean = printable(text) or "uncategorised"
    wrapped = textwrap.wrap(clean, _LONGEST_LABEL)
    if len(wrapped) > lines:
        wrapped = [*wrapped[: lines - 1], wrapped[lines - 1][: _LONGEST_LABEL - 1] + "…"]
    return "\n".join(wrapped)


def _with_unique_ids(svg: str, name: str, title: str) -> str:
    """The SVG element alone, its ids and references to them prefixed, scaled by the page, and with a title."""
    ET.register_namespace("", _SVG)
    # What stands before the element, the XML declaration and a document type, has no place inside a page.
    root = ET.fromstring("<svg" + svg.partition("<svg")[2])
    for element in root.iter():
        for key, value in list(element.attrib.items()):
            if key == "id":
                element.set(key, f"{name}-{value}")
            elif key == f"{{{_XLINK}}}href":
                del element.attrib[key]  # HTML knows `href` without the name space
                element.set("href", f"#{name}-{value[1:]}" if value.startswith("#") else value)
            elif "url(#" in value:
                element.set(key, value.replace("url(#", f"url(#{name}-"))
    for key in ("width", "height"):
        root.attrib.pop(key, None)
    root.set("role", "img")
    described = ET.Element(f"{{{_SVG}}}title")
    described.text = title
    root.insert(0, described)
    return ET.tostring(root, encoding="unicode")
