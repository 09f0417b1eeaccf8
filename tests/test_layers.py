"""The floors of docs/architecture.md: no import runs back up, no circle, and the ground floor needs no torch."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from paths import ROOT

LINT_IMPORTS = str(Path(sys.executable).with_name("lint-imports"))

# Importing any of these is an error, as if they were not installed; `import moe_ray` itself is the first of the modules.
IMPORT_EACH = """
import importlib, json, sys

modules, blocked = json.loads(sys.stdin.read())


class Blocked:
    def find_spec(self, name, path=None, target=None):
        if any(name == other or name.startswith(other + ".") for other in blocked):
            raise ImportError(f"{name} is not for the ground floor")


sys.meta_path.insert(0, Blocked())
failures = {}
for module in modules:
    try:
        importlib.import_module(module)
    except ImportError as error:
        failures[module] = str(error)
print(json.dumps(failures))
"""

NOT_ON_THE_GROUND_FLOOR = ("torch", "transformers", "ray", "mlflow", "scipy.stats")


def modules_of(package: str) -> list[str]:
    """A package of moe_ray and every module inside, as dotted names."""
    paths = sorted((ROOT / "moe_ray" / package).rglob("*.py"))
    return [
        path.relative_to(ROOT).with_suffix("").as_posix().replace("/", ".").removesuffix(".__init__") for path in paths
    ]


GROUND_FLOOR = [
    "moe_ray",
    "moe_ray.errors",
    "moe_ray.chat_messages",
    "moe_ray.experts",
    *modules_of("config"),
    *modules_of("storage"),
    *modules_of("prompts"),
    "moe_ray.routing.counts",
    "moe_ray.routing.count_tables",
    "moe_ray.routing.count_store",
    *modules_of("identification"),
    "moe_ray.run_directory",
]


def imports_that_fail(modules: list[str], blocked: tuple[str, ...]) -> dict[str, str]:
    done = subprocess.run(
        [sys.executable, "-c", IMPORT_EACH],
        input=json.dumps([modules, blocked]),
        capture_output=True,
        text=True,
        cwd=ROOT,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.slow
def test_the_ground_floor_imports_without_torch_transformers_or_scipy_stats():
    assert imports_that_fail(GROUND_FLOOR, NOT_ON_THE_GROUND_FLOOR) == {}


def test_a_module_that_needs_one_of_them_would_be_noticed():
    modules = [*NOT_ON_THE_GROUND_FLOOR, "moe_ray.routing.masking"]
    failures = imports_that_fail(modules, NOT_ON_THE_GROUND_FLOOR)
    assert [module for module in modules if "is not for the ground floor" not in failures.get(module, "")] == []


def lint_imports(folder: Path) -> subprocess.CompletedProcess[str]:
    """What import-linter says of the checkout in this folder."""
    command = [LINT_IMPORTS, "--no-logo", "--no-cache"]
    return subprocess.run(command, capture_output=True, text=True, cwd=folder, check=False)


def test_the_floors_hold():
    done = lint_imports(ROOT)
    assert done.returncode == 0, done.stdout + done.stderr


def copy_of_the_package(folder: Path) -> Path:
    """A copy of the package's code beside the project's own contracts."""
    shutil.copytree(ROOT / "moe_ray", folder / "moe_ray", ignore=shutil.ignore_patterns("__pycache__", "*.json*"))
    shutil.copy(ROOT / "pyproject.toml", folder)
    return folder


OFFENDERS = {
    "back up": (
        "storage/folder.py",
        "from moe_ray.report import printable",
        "moe_ray.storage.folder -> moe_ray.report.printable",
    ),
    "inside a function": (
        "routing/counts.py",
        "def late():\n    import moe_ray.finetuning.trainer",
        "moe_ray.routing.counts -> moe_ray.finetuning.trainer",
    ),
    "for types only": (
        "models/loss.py",
        "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from moe_ray.routing.counts import RoutingCounts",
        "moe_ray.models.loss -> moe_ray.routing.counts",
    ),
    "between siblings": (
        "identification/risk.py",
        "import moe_ray.evaluation.intervals",
        "moe_ray.identification.risk -> moe_ray.evaluation.intervals",
    ),
    "a job that knows its stage": (
        "orchestration/jobs/judge.py",
        "import moe_ray.orchestration.stages.rounds",
        "moe_ray.orchestration.jobs.judge -> moe_ray.orchestration.stages.rounds",
    ),
    "a circle": ("prompts/examples.py", "import moe_ray.prompts.batches", "No cycles are allowed in moe_ray.prompts"),
    "ray in the core": ("studies/trial.py", "import ray.data", "moe_ray.studies.trial -> ray"),
    "mlflow in a command": ("cli/merge.py", "import mlflow", "moe_ray.cli.merge -> mlflow"),
}


@pytest.fixture(scope="module")
def told_of_offenders(tmp_path_factory):
    """What import-linter says of a copy that is clean but for the offending lines."""
    folder = copy_of_the_package(tmp_path_factory.mktemp("checkout"))
    assert lint_imports(folder).returncode == 0
    for path, line, _ in OFFENDERS.values():
        with (folder / "moe_ray" / path).open("a") as file:
            file.write(f"\n{line}\n")
    done = lint_imports(folder)
    assert done.returncode == 1
    return " ".join(done.stdout.split())


@pytest.mark.slow
@pytest.mark.parametrize("offender", OFFENDERS)
def test_the_contracts_notice(told_of_offenders, offender):
    assert OFFENDERS[offender][2] in told_of_offenders


@pytest.mark.slow
@pytest.mark.parametrize("package", ["moe_ray/attic", "moe_ray/orchestration/attic"])
def test_a_package_without_a_floor_is_noticed(tmp_path, package):
    folder = copy_of_the_package(tmp_path)
    (folder / package).mkdir()
    (folder / package / "__init__.py").touch()
    done = lint_imports(folder)
    assert done.returncode == 1
    assert "attic" in done.stdout
