"""The core knows neither Ray nor MLflow, and a rule of the linter keeps it so."""

from __future__ import annotations

import subprocess
import sys

import pytest
from paths import ROOT

# What looks whether they are there, as accelerate does, is told that they are not.
BLOCKED = """
import sys

sys.modules["ray"] = sys.modules["mlflow"] = None
"""

CORE = sorted(
    path.relative_to(ROOT).with_suffix("").as_posix().replace("/", ".").removesuffix(".__init__")
    for path in (ROOT / "moe_ray").rglob("*.py")
    if "orchestration" not in path.parts
)


def run_python(code: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", BLOCKED + code], capture_output=True, text=True, cwd=ROOT, check=False)


@pytest.mark.slow
def test_every_core_module_imports_where_neither_ray_nor_mlflow_can_be():
    done = run_python("".join(f"import {module}\n" for module in CORE))
    assert done.returncode == 0, done.stderr


def test_the_block_works():
    assert "import of ray halted" in run_python("import ray").stderr


def lint(path: str, text: str) -> subprocess.CompletedProcess[str]:
    """Ruff's verdict, under the repository's settings, on a file of this content at this place."""
    command = [sys.executable, "-m", "ruff", "check", "--no-cache", "--select", "TID251", "--stdin-filename", path, "-"]
    return subprocess.run(command, input=text, capture_output=True, text=True, cwd=ROOT, check=False)


@pytest.mark.parametrize("line", ["import ray", "from ray.train import report", "import mlflow"])
def test_the_linter_refuses_orchestration_in_the_core(line):
    done = lint("moe_ray/offender.py", f"{line}\n")
    assert done.returncode == 1
    assert "TID251" in done.stdout


@pytest.mark.parametrize("path", ["moe_ray/orchestration/fine.py", "workflows/fine.py", "tests/test_fine.py"])
def test_the_linter_allows_it_elsewhere(path):
    assert lint(path, "import ray\n").returncode == 0


def test_the_core_as_it_is_passes_the_rule():
    command = [sys.executable, "-m", "ruff", "check", "--no-cache", "--select", "TID251", "moe_ray"]
    assert subprocess.run(command, capture_output=True, cwd=ROOT, check=False).returncode == 0
