"""The templates of the pages: every value is escaped, and a name that is not given is an error."""

from __future__ import annotations

import jinja2
from markupsafe import Markup, escape

from moe_ray.report.format import KEPT_TOGETHER


def templates() -> jinja2.Environment:
    """The templates of this package by their file names; they have the filter `unbroken`."""
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("moe_ray.report.html", "."),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["unbroken"] = unbroken
    return environment


def unbroken(text: str) -> Markup:
    """A sentence, escaped, in which no line ends inside an interval, an n or a p (`5e-05` would break at its hyphen)."""
    # What is matched has no character that escaping changes.
    return Markup(KEPT_TOGETHER.sub(lambda found: f'<span class="number">{found[0]}</span>', str(escape(text))))
