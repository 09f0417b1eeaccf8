from __future__ import annotations

import pytest
from html_page import Page
from run_directory import write_controlled, write_identified, write_repaired, write_swept

from moe_ray.config.report import ReportConfig
from moe_ray.report.html.page import write_report
from moe_ray.run_directory import open_run
from moe_ray.storage.folder import Folder

ATTACK = "<script>alert(1)</script><img src=http://evil.test/x onerror=alert(2)> {{ 7*7 }} $\\frac{1}$ \x1b[2J"
HOSTILE = ("fraud </text><script>alert(3)</script>", "$theft_{")


@pytest.fixture(scope="session")
def hostile_run(tmp_path_factory):
    """The folder of a run with hostile prompts, answers and categories, with a sweep and rounds."""
    path = tmp_path_factory.mktemp("hostile") / "run"
    folder = Folder.open(str(path))
    write_identified(folder, categories=HOSTILE)
    write_repaired(folder, prompt=ATTACK, categories=HOSTILE)
    write_swept(folder)
    return path


@pytest.fixture(scope="session")
def page(hostile_run):
    """The report of that run, which lies in its folder."""
    write_report(open_run(str(hostile_run)), ReportConfig(examples=3))
    return Page((hostile_run / "report.html").read_text())


@pytest.fixture(scope="session")
def run(tmp_path_factory):
    """A run that was identified, repaired and swept, with plain texts."""
    path = tmp_path_factory.mktemp("plain") / "run"
    folder = Folder.open(str(path))
    write_identified(folder)
    write_controlled(folder)
    write_repaired(folder)
    write_swept(folder)
    return open_run(str(path))


@pytest.fixture(scope="session")
def identified(tmp_path_factory):
    """A run of which only identification is finished."""
    path = tmp_path_factory.mktemp("identified") / "run"
    write_identified(Folder.open(str(path)))
    return open_run(str(path))
