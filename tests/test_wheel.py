"""The wheel holds all that the package needs, and works in an empty folder, away from the checkout."""

import os
import subprocess
import sys
import zipfile

import pytest
from paths import ROOT

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """The wheel that `pip wheel` makes of a copy of what git tracks, with the build tools that are installed."""
    folder = tmp_path_factory.mktemp("wheel")
    tracked = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.split(
        "\n"
    )
    for name in filter(None, tracked):
        if (ROOT / name).is_file() and name.startswith(("moe_ray/", "pyproject.toml", "README.md", "LICENSE")):
            copy = folder / "source" / name
            copy.parent.mkdir(parents=True, exist_ok=True)
            copy.write_bytes((ROOT / name).read_bytes())
    build = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--disable-pip-version-check"]
    subprocess.run([*build, "--wheel-dir", str(folder), str(folder / "source")], check=True, timeout=300)
    (made,) = folder.glob("moe_ray-*.whl")
    return made


def test_every_file_of_the_package_is_in_the_wheel(wheel):
    there = set(zipfile.ZipFile(wheel).namelist())
    package = {
        path.relative_to(ROOT).as_posix()
        for path in (ROOT / "moe_ray").rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    assert package - there == set()


def test_it_runs_in_an_empty_folder_without_the_checkout(wheel, tmp_path):
    site = tmp_path / "site"
    zipfile.ZipFile(wheel).extractall(site)
    (tmp_path / "empty").mkdir()
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"} | {
        "PYTHONPATH": str(site)
    }

    def said(*words):
        done = subprocess.run(
            [sys.executable, "-P", *words],
            cwd=tmp_path / "empty",
            env=environment,
            capture_output=True,
            text=True,
            timeout=300,
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    assert str(site) in said("-c", "import moe_ray; print(moe_ray.__file__)")
    assert said("-m", "moe_ray", "config", "schema").startswith("{")
    assert "moe-ray organism" in said("-m", "moe_ray", "organism", "--help")
    drawn = said(
        "-c",
        "from moe_ray.report.html.page import _script; from moe_ray.report.html.templates import templates\n"
        "print(templates().list_templates(), len(_script()))",
    )
    assert "page.html.jinja" in drawn
