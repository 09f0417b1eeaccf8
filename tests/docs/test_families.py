import pytest
from moe_families import page
from paths import ROOT


@pytest.mark.slow  # reads the library's own files
def test_the_page_of_families_says_what_the_tests_go_through():
    written = (ROOT / "docs" / "families.md").read_text()
    assert written == page() + "\n", "run `python tests/moe_families.py > docs/families.md`"
