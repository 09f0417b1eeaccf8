"""What the next person looks for is there, and says what the project does."""

import hashlib
import re
import tomllib
from importlib.metadata import PackageNotFoundError, metadata
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from paths import ROOT

PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
CONTRIBUTING = (ROOT / "CONTRIBUTING.md").read_text()
YAML_FILES = [
    "CITATION.cff",
    ".pre-commit-config.yaml",
    ".github/workflows/ci.yml",
    *(f".github/ISSUE_TEMPLATE/{name}.yml" for name in ("bug", "idea", "model_family")),
]


def read_yaml(name: str):
    return yaml.safe_load((ROOT / name).read_text())


@pytest.mark.parametrize("name", ["README.md", "CHANGELOG.md", "SECURITY.md", ".github/pull_request_template.md"])
def test_the_file_is_there_and_says_something(name):
    assert len((ROOT / name).read_text().split()) > 20


@pytest.mark.parametrize("name", YAML_FILES)
def test_yaml_parses_to_a_mapping(name):
    assert isinstance(read_yaml(name), dict)


def test_the_license_is_apaches_own_text_and_pyproject_says_so():
    text = (ROOT / "LICENSE").read_bytes()
    assert hashlib.sha256(text).hexdigest() == "cfc7749b96f63bd31c3c42b5c471bf756814053e847c10f3eb003417bc523d30"
    assert PYPROJECT["project"]["license"] == "Apache-2.0"
    assert PYPROJECT["project"]["license-files"] == ["LICENSE"]


def test_the_citation_is_of_this_version_and_license():
    citation = read_yaml("CITATION.cff")
    assert citation["cff-version"] == "1.2.0"
    assert {"message", "title", "authors"} <= citation.keys()
    assert citation["version"] == PYPROJECT["project"]["version"]
    assert citation["license"] == PYPROJECT["project"]["license"]
    assert citation["authors"] == PYPROJECT["project"]["authors"]


def test_nothing_names_an_address_that_does_not_exist():
    assert "urls" not in PYPROJECT["project"]
    assert not {"doi", "url", "repository-code", "identifiers"} & read_yaml("CITATION.cff").keys()


def test_the_package_says_that_it_is_typed():
    assert (ROOT / "moe_ray" / "py.typed").read_text() == ""
    assert "py.typed" in PYPROJECT["tool"]["setuptools"]["package-data"]["moe_ray"]


def test_continuous_integration_is_ci_run_and_nothing_else():
    (job,) = read_yaml(".github/workflows/ci.yml")["jobs"].values()
    assert [step["run"] for step in job["steps"] if "run" in step] == [".ci/run"]
    assert (ROOT / ".ci" / "run").stat().st_mode & 0o111


LINTERS = ("ruff check", "ruff format --check", "lint-imports", "mypy")


@pytest.mark.parametrize("name", ["Makefile", ".ci/run", ".pre-commit-config.yaml"])
def test_every_linter_runs_in(name):
    text = (ROOT / name).read_text()
    assert [linter for linter in LINTERS if f"bin/{linter}" not in text.replace("$(BIN)", "bin")] == []


def test_pre_commit_fetches_nothing():
    repositories = read_yaml(".pre-commit-config.yaml")["repos"]
    assert [repository["repo"] for repository in repositories] == ["local"]
    assert {hook["language"] for hook in repositories[0]["hooks"]} == {"system"}


def test_the_tested_versions_hold_every_development_tool():
    pinned = {line.partition("==")[0].lower() for line in (ROOT / "constraints.txt").read_text().splitlines()}
    tools = [re.split(r"[><=\[]", tool)[0].lower() for tool in PYPROJECT["project"]["optional-dependencies"]["dev"]]
    assert [tool for tool in tools if tool not in pinned] == []


def test_every_tested_version_can_be_installed_on_the_oldest_python():
    oldest = re.fullmatch(r">=([\d.]+)", PYPROJECT["project"]["requires-python"])[1] + ".0"
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    pins = [Requirement(line) for line in lines if not line.startswith("#")]
    # A pin with a marker is one of several, of which one holds on each Python.
    held = [pin for pin in pins if pin.marker is None or pin.marker.evaluate({"python_full_version": oldest})]
    assert sorted({pin.name for pin in pins} - {pin.name for pin in held}) == []
    refused = []
    for pin in held:
        try:
            installed = metadata(pin.name)
        except PackageNotFoundError:
            continue  # of an extra that is not installed here
        if installed["Version"] in pin.specifier and not SpecifierSet(installed.get("Requires-Python") or "").contains(
            oldest
        ):
            refused.append(f"{pin} wants Python {installed.get('Requires-Python')}")
    assert refused == []


def test_contributing_fits_a_screen_and_names_what_there_is():
    assert len(CONTRIBUTING.splitlines()) <= 60
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    assert set(re.findall(r"`make ([a-z-]+)`", CONTRIBUTING)) <= targets
    markers = {marker.partition(":")[0] for marker in PYPROJECT["tool"]["pytest"]["ini_options"]["markers"]}
    section = CONTRIBUTING.partition("Markers:")[2].partition("Warnings")[0]
    assert set(re.findall(r"`(\w+)` \(", section)) == markers


def folders_of_the_code() -> set[str]:
    folders = (path for top in ("moe_ray", "tests", "workflows") for path in (ROOT / top).rglob("*") if path.is_dir())
    return {path.name for path in folders} - {"__pycache__"}


@pytest.mark.slow
@pytest.mark.parametrize("name", [".gitignore", ".rayignore"])
def test_no_pattern_of_data_hides_a_package(name):
    patterns = [line.rstrip("/") for line in (ROOT / name).read_text().splitlines()]
    assert [pattern for pattern in patterns if pattern in folders_of_the_code()] == []


def test_no_pattern_of_the_cluster_file_hides_a_package():
    assert set(read_yaml("cluster.yaml")["rsync_exclude"]) & folders_of_the_code() == set()


def test_a_pattern_that_hides_a_package_would_be_seen():
    assert "models" in folders_of_the_code()


def test_issue_forms_have_what_github_asks_of_them():
    for path in sorted(Path(ROOT / ".github" / "ISSUE_TEMPLATE").iterdir()):
        form = yaml.safe_load(path.read_text())
        assert {"name", "description", "body"} <= form.keys(), path.name
        ids = [field["id"] for field in form["body"]]
        assert len(ids) == len(set(ids)) > 0, path.name
