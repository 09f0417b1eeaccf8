"""The commands that a page shows."""

from __future__ import annotations

import re

_OURS = re.compile(r"^(?:moe-ray|python workflows/(?P<script>\w+)\.py) ")


def commands_on(text: str) -> list[str]:
    """The lines of fenced blocks that begin with one of our commands, without comments; a continued line is one."""
    lines = []
    for block in re.findall(r"^```(?:\w*)\n(.*?)^```", text, re.MULTILINE | re.DOTALL):
        for line in block.replace("\\\n", " ").splitlines():
            for part in line.split("&&"):
                command = re.sub(r"\s+#\s.*$", "", part.strip())
                if _OURS.match(command):
                    lines.append(command)
    return lines
