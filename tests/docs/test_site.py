"""The documentation builds as a site, with warnings as errors, and shows nothing that is fetched."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from paths import ROOT

NAVIGATION = (ROOT / "mkdocs.yml").read_text().partition("\nnav:\n")[2]


def test_every_page_has_its_place_in_the_navigation():
    assert set(re.findall(r"([\w-]+\.md)", NAVIGATION)) == {page.name for page in (ROOT / "docs").glob("*.md")}


@pytest.mark.slow
def test_the_site_builds_without_a_warning_and_asks_no_other_server(tmp_path):
    mkdocs = str(Path(sys.executable).with_name("mkdocs"))
    environment = os.environ | {"NO_MKDOCS_2_WARNING": "1", "DISABLE_MKDOCS_2_WARNING": "true", "PYTHONPATH": str(ROOT)}
    built = subprocess.run(
        [mkdocs, "build", "--quiet", "--site-dir", str(tmp_path / "site")],
        cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert (built.returncode, built.stdout.strip(), built.stderr.strip()) == (0, "", "")
    api = (tmp_path / "site" / "api.html").read_text()
    assert "fine_tune" in api
    for page in (tmp_path / "site").glob("*.html"):
        loaded = re.findall(
            r'<(?:script|img|iframe)[^>]*src="([^"]+)"|<link[^>]*rel="stylesheet"[^>]*href="([^"]+)"', page.read_text()
        )
        assert [address for found in loaded for address in found if address.startswith(("http", "//"))] == [], page.name


def test_the_site_is_strict():
    assert "strict: true" in (ROOT / "mkdocs.yml").read_text().splitlines()
