"""The templates of the pages: every value is escaped, and a name that is not given is an error."""

from __future__ import annotations

import jinja2


def templates() -> jinja2.Environment:
    """The templates of this package by their file names."""
    return jinja2.Environment(
        loader=jinja2.PackageLoader("moe_ray.report.html", "."),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
