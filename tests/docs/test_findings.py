"""The page of findings names tests that are there, and no finding without one."""

import ast
import re

import pytest
from paths import ROOT, TESTS

PAGE = (ROOT / "docs" / "findings.md").read_text()
ROWS = [line for line in PAGE.splitlines() if line.startswith("| ") and not line.startswith(("| no. |", "| fault |"))]


def named_in(row: str) -> list[tuple[str, str]]:
    """File and name of every test in a row's last cell."""
    found, file = [], ""
    for name in re.findall(r"`([^`]+)`", row.split(" | ")[-1]):
        if name.endswith(".py"):
            file = name
        elif name.startswith("test_"):
            found.append((file, name))
    return found


def names_in(file: str) -> set[str]:
    tree = ast.parse((ROOT / file).read_text())
    return {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)}


@pytest.mark.slow
@pytest.mark.parametrize("row", ROWS, ids=lambda row: row[2:40])
def test_every_finding_has_tests_that_exist(row):
    named = named_in(row)
    assert named
    for file, name in named:
        assert name in names_in(file), f"{file} has no {name}"


def test_every_numbered_finding_is_there():
    numbers = [int(found[1]) for row in ROWS if (found := re.match(r"\| (\d+) \|", row))]
    assert sorted(numbers) == list(range(23))
    assert len(ROWS) - len(numbers) == 22


def test_a_test_that_is_not_there_would_be_seen():
    row = "| 1 | fault | cure | `tests/docs/test_findings.py`: `test_every_numbered_finding_is_there`, `test_none` |"
    (first, second) = named_in(row)
    assert first[1] in names_in(first[0])
    assert second[1] not in names_in(second[0])
    assert (TESTS / "docs" / "test_findings.py").is_file()
