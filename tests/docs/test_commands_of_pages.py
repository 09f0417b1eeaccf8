"""Every command on a page can be pasted into bash and zsh, and the command line takes it."""

import re
import shlex
from pathlib import Path

import pytest
from paths import ROOT

from moe_ray.cli.checks import split_words
from moe_ray.cli.commands import COMMANDS
from moe_ray.cli.parser import parse
from moe_ray.config.io import load_config

PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
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


SHOWN = [(page, command) for page in PAGES for command in commands_on(page.read_text())]


@pytest.mark.slow
@pytest.mark.parametrize(("page", "command"), SHOWN, ids=[f"{page.name}: {command}" for page, command in SHOWN])
def test_the_command_line_takes_it(page: Path, command: str):
    words = shlex.split(command.partition(" > ")[0])
    words = words[1:] if words[0] == "moe-ray" else [Path(words[1]).stem, *words[2:]]
    assert words[0] in COMMANDS, page
    if words[-1] == "--help":
        return
    parsed = parse(words)
    if "words" in parsed:
        load_config(overrides=split_words(parsed.words)[1])


@pytest.mark.parametrize(("page", "command"), SHOWN, ids=[f"{page.name}: {command}" for page, command in SHOWN])
def test_a_shell_changes_nothing_in_it(page: Path, command: str):
    unquoted = re.sub(r"'[^']*'|\"[^\"]*\"", "", command.partition(" > ")[0])
    assert not set(unquoted) & set("[]{}*?<>$!;|&()"), page


def test_commands_are_found_in_blocks_continued_lines_and_chains():
    text = "```\nmoe-ray plan a   # b\nmoe-ray full b \\\n  k=1\nmoe-ray export a b && inspect view\n```\nmoe-ray not\n"
    assert commands_on(text) == ["moe-ray plan a", "moe-ray full b    k=1", "moe-ray export a b"]
    assert len(SHOWN) > 20
