"""Links from a page to files beside docs/ are shown as plain text on the site, which holds the pages only."""

import re

_OUTSIDE = re.compile(r"\[([^\]]+)\]\(\.\./[^)]+\)")


def on_page_markdown(markdown: str, **_: object) -> str:
    """The page's text, with each link that leaves docs/ replaced by its words."""
    return _OUTSIDE.sub(r"`\1`", markdown)
