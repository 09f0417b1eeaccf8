"""The documentation speaks of what there is: every path, module, name and setting on its pages exists."""

import importlib
import re
from pathlib import Path

import pytest
from paths import ROOT

from moe_ray.config.run import Config

PAGES = [
    *sorted((ROOT / "docs").glob("*.md")),
    *(ROOT / f"{name}.md" for name in ("README", "CONTRIBUTING", "SECURITY")),
]
ARCHITECTURE = (ROOT / "docs" / "architecture.md").read_text()

_PATH = re.compile(r"(?<![\w/.-])((?:moe_ray|tests|docs|benchmarks|workflows|\.ci)/[\w./*-]*[\w/])")
_DOTTED = re.compile(r"(?<![\w/.])moe_ray(?:\.\w+)+")


def paths_in(text: str) -> set[str]:
    return set(_PATH.findall(text))


def is_there(name: str) -> bool:
    """Whether a dotted name is a module, or something that a module has."""
    module, _, rest = name, "", ""
    while module:
        try:
            found = importlib.import_module(module)
        except ModuleNotFoundError:
            module, _, last = module.rpartition(".")
            rest = f"{last}.{rest}" if rest else last
            continue
        for part in filter(None, rest.split(".")):
            if not hasattr(found, part):
                return False
            found = getattr(found, part)
        return True
    return False


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_path_on_the_page_exists(page: Path):
    missing = {path for path in paths_in(page.read_text()) if not (ROOT / path).exists()}
    assert missing == set()


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_dotted_name_on_the_page_can_be_imported(page: Path):
    assert {name for name in _DOTTED.findall(page.read_text()) if not is_there(name)} == set()


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_link_of_the_page_leads_somewhere(page: Path):
    targets = re.findall(r"\]\((?!https?:)([^)#]+)", page.read_text())
    found = {(page.parent / target).resolve() for target in targets}
    assert [str(path) for path in found if not path.exists()] == []


@pytest.mark.slow
@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_setting_on_the_page_is_one(page: Path):
    groups = {name for name, value in vars(Config()).items() if hasattr(value, "__dataclass_fields__")}
    named = re.findall(r"`(\w+)\.(\w+)(?:=[^`]*)?`", page.read_text())
    unknown = [
        f"{group}.{key}" for group, key in named if group in groups and not hasattr(getattr(Config(), group), key)
    ]
    assert [name for name in unknown if name.rpartition(".")[2] not in _FILE_ENDINGS] == []


_FILE_ENDINGS = ("yaml", "json", "jsonl", "html", "parquet")


def test_the_index_names_every_page_once():
    index = (ROOT / "docs" / "README.md").read_text()
    pages = {page.name for page in (ROOT / "docs").glob("*.md")} - {"README.md"}
    assert [page for page in pages if index.count(f"]({page})") != 1] == []


def test_the_changelog_says_nothing_twice():
    entries = re.findall(r"^- .*(?:\n  .*)*", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert len(entries) > 50
    assert [entry for entry in set(entries) if entries.count(entry) > 1] == []


def test_every_package_has_its_place_in_the_house():
    house = ARCHITECTURE.partition("## The house")[2].partition("A module imports only")[0]
    there = {
        path.name for path in (ROOT / "moe_ray").iterdir() if path.suffix == ".py" or (path / "__init__.py").exists()
    }
    assert [name for name in there - {"__init__.py"} if not re.search(rf"(?<!\w){re.escape(name)}(?!\w)", house)] == []


def test_there_are_seventeen_invariants_with_a_name_and_tests_each():
    rows = re.findall(r"^\| (\d+) \| \*\*([^*]+)\*\* \|([^|]+)\|([^|]+)\|$", ARCHITECTURE, re.MULTILINE)
    assert [int(number) for number, *_ in rows] == list(range(1, 18))
    assert len({name for _, name, *_ in rows}) == 17
    for _, name, what, tests in rows:
        files = re.findall(r"`(tests/[\w/]+\.py)`", tests)
        assert what.strip(), name
        assert files, name
        assert all("def test_" in (ROOT / file).read_text() for file in files), name


def test_the_sections_of_the_stage_table_are_those_of_the_configuration():
    section = ARCHITECTURE.partition("## One name per stage")[2].partition("## What is stored")[0]
    named = set(re.findall(r"`(\w+)`", re.sub(r"^\| `\w+` \|", "|", section, flags=re.MULTILINE)))
    groups = {name for name, value in vars(Config()).items() if hasattr(value, "__dataclass_fields__")}
    assert groups - named == set()


def test_a_missing_path_or_name_would_be_seen():
    assert paths_in("in `moe_ray/attic/old.py`, it") == {"moe_ray/attic/old.py"}
    assert not is_there("moe_ray.experts.Attic")
    assert not is_there("moe_ray.attic")
    assert is_there("moe_ray.experts.ExpertMasks.union")
