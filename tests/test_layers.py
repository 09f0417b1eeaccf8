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
    "moe_ray.messages",
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


def test_the_ground_floor_imports_without_torch_transformers_or_scipy_stats():
    assert imports_that_fail(GROUND_FLOOR, NOT_ON_THE_GROUND_FLOOR) == {}


@pytest.mark.parametrize("blocked", ["torch", "transformers"])
def test_the_block_would_catch_a_module_that_needs_it(blocked):
    module = {"torch": "moe_ray.routing.masking", "transformers": "moe_ray.models.loading"}[blocked]
    assert blocked in imports_that_fail([module], (blocked,))[module]


def test_scipy_stats_would_be_noticed():
    assert "scipy.stats" in imports_that_fail(["scipy.stats"], NOT_ON_THE_GROUND_FLOOR)["scipy.stats"]


def lint_imports(folder: Path) -> subprocess.CompletedProcess[str]:
    """What import-linter says of the checkout in this folder."""
    command = [LINT_IMPORTS, "--no-logo", "--no-cache"]
    return subprocess.run(command, capture_output=True, text=True, cwd=folder, check=False)


def test_the_floors_hold():
    done = lint_imports(ROOT)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.fixture(scope="module")
def copy_of_the_package(tmp_path_factory):
    """A copy of the package's code beside the project's own contracts."""
    folder = tmp_path_factory.mktemp("checkout")
    shutil.copytree(ROOT / "moe_ray", folder / "moe_ray", ignore=shutil.ignore_patterns("__pycache__", "*.json*"))
    shutil.copy(ROOT / "pyproject.toml", folder)
    return folder


OFFENDERS = {
    "back up": ("storage/folder.py", "from moe_ray.report import printable", "moe_ray.storage"),
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
    "ray in the core": ("studies/trial.py", "import ray.data", "moe_ray.studies.trial"),
    "mlflow in a command": ("cli/merge.py", "import mlflow", "moe_ray.cli.merge"),
    "a package without a floor": ("attic/__init__.py", "", "attic"),
}


@pytest.mark.parametrize("offender", OFFENDERS)
def test_the_contracts_notice(copy_of_the_package, offender):
    path, line, told = OFFENDERS[offender]
    module = copy_of_the_package / "moe_ray" / path
    before = module.read_text() if module.exists() else None
    module.parent.mkdir(exist_ok=True)
    module.write_text((before or "") + f"\n{line}\n")
    try:
        done = lint_imports(copy_of_the_package)
    finally:
        if before is None:
            shutil.rmtree(module.parent)
        else:
            module.write_text(before)
    assert done.returncode == 1
    assert told in " ".join(done.stdout.split())


def test_the_copy_itself_is_clean(copy_of_the_package):
    assert lint_imports(copy_of_the_package).returncode == 0
