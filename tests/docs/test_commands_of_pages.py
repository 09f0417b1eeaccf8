"""Every command on a page can be pasted into bash and zsh, and the command line takes it."""

import re
import shlex
from pathlib import Path

import pytest
from page_commands import commands_on
from paths import ROOT

from moe_ray.cli.checks import split_words
from moe_ray.cli.commands import COMMANDS
from moe_ray.cli.parser import parse
from moe_ray.config.io import load_config

PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]

_FOLDERS = "workflows|examples|benchmarks|deploy|docs|tests"

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


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_no_command_has_a_comment_behind_it_which_zsh_takes_for_more_words(page: Path):
    assert re.findall(r"^ *(?:moe-ray|python|make|pip|ray|export|\. |\().* #.*", page.read_text(), re.MULTILINE) == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_file_of_the_repository_that_a_command_names_is_there(page: Path):
    missing = [word for word in files_of_commands(page.read_text()) if not (ROOT / word).is_file()]
    assert missing == []


def files_of_commands(text: str) -> list[str]:
    """Files below folders of this repository that the fenced blocks name, a value behind `=` included."""
    blocks = re.findall(r"^```(?:\w*)\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    return re.findall(rf"(?<![\w/.:-])((?:{_FOLDERS})/[\w/-]+\.\w+|cluster\.yaml)\b", "\n".join(blocks))


def test_files_of_commands_are_found():
    text = "workflows/none.yaml\n```\nmoe-ray full a --config workflows/demo.yaml k=deploy/x.yaml\nray up cluster.yaml\n```"
    assert files_of_commands(text) == ["workflows/demo.yaml", "deploy/x.yaml", "cluster.yaml"]
    assert "workflows/demo.yaml" in files_of_commands((ROOT / "docs" / "tutorial.md").read_text())


def test_commands_are_found_in_blocks_continued_lines_and_chains():
    text = "```\nmoe-ray plan a   # b\nmoe-ray full b \\\n  k=1\nmoe-ray export a b && inspect view\n```\nmoe-ray not\n"
    assert commands_on(text) == ["moe-ray plan a", "moe-ray full b    k=1", "moe-ray export a b"]
    assert len(SHOWN) > 20
