"""The names of `moe_ray` itself: listed, typed, and imported when they are first used."""

from __future__ import annotations

import ast
import subprocess
import sys
import tomllib

import pytest
from paths import ROOT

import moe_ray

STUB = ast.parse((ROOT / "moe_ray" / "__init__.pyi").read_text())

IMPORTED = {
    alias.name: f"moe_ray.{node.module}"
    for node in STUB.body
    if isinstance(node, ast.ImportFrom)
    for alias in node.names
}


def listed_in_the_stub() -> list[str]:
    (assigned,) = (node.value for node in STUB.body if isinstance(node, ast.Assign))
    return ast.literal_eval(assigned)


def test_the_stub_the_list_and_what_is_imported_are_the_same_names():
    assert listed_in_the_stub() == sorted(IMPORTED) == sorted(moe_ray.__all__) == sorted(dir(moe_ray))


@pytest.mark.parametrize("name", sorted(IMPORTED))
def test_a_public_name_is_what_its_module_calls_so(name):
    module = __import__(IMPORTED[name], fromlist=[name])
    assert getattr(moe_ray, name) is getattr(module, name)
    assert getattr(moe_ray, name).__doc__


def test_the_stages_of_a_run_and_what_they_take_and_give_are_public():
    stages = {"prepare", "capture", "identify", "fine_tune", "evaluate"}
    tools = {"merge_adapter", "apply_adapter", "adapter_applied", "save_adapter", "route_through", "find_moe_layers"}
    values = {"RoutingCounts", "ExpertMasks", "Expert", "Batch", "Example", "InputError"}
    assert stages | tools | values | {"read_examples", "masks_from_experts", "open_run"} <= set(dir(moe_ray))


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="no_such_name"):
        _ = moe_ray.no_such_name


def test_importing_the_package_imports_neither_torch_nor_pandas():
    heavy = "{'torch', 'pandas', 'numpy', 'transformers', 'scipy'}"
    code = f"import sys, moe_ray; dir(moe_ray); print(sorted({heavy} & sys.modules.keys()))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True)
    assert done.stdout.strip() == "[]"


@pytest.mark.slow
def test_the_ground_floor_imports_without_torch():
    folders = ("config", "storage", "prompts", "identification")
    files = [path for folder in folders for path in sorted((ROOT / "moe_ray" / folder).glob("*.py"))]
    modules = [f"moe_ray.{path.parent.name}.{path.stem}" for path in files if path.stem != "__init__"]
    modules += ["moe_ray.experts", "moe_ray.progress", "moe_ray.routing.counts", "moe_ray.routing.count_store"]
    code = "import sys\nsys.modules['torch'] = sys.modules['transformers'] = None\n"
    code += "".join(f"import {module}\n" for module in modules)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=False)
    assert done.returncode == 0, done.stderr


def test_the_stub_is_shipped_with_the_package():
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())
    assert "*.pyi" in settings["tool"]["setuptools"]["package-data"]["moe_ray"]
