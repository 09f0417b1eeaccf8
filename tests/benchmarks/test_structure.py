"""The tree that benchmarks/structure.py prints is that of the imports."""

import sys

import grimp
import pytest
from paths import ROOT

sys.path.append(str(ROOT / "benchmarks"))
from structure import children_graph, circles, describe, floors, read_modules

FILES = {
    "__init__.py": "",
    "errors.py": "class Error(Exception):\n    pass\n",
    "storage/__init__.py": "",
    "storage/folder.py": "from moe_ray.errors import Error\n",
    "report/__init__.py": "",
    "report/page.py": "def late():\n    from moe_ray.storage import folder\n",
    "report/words.py": "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import moe_ray.report.page\n",
    "ring_a.py": "import moe_ray.ring_b\n",
    "ring_b.py": "from moe_ray.ring_a import nothing\nfrom moe_ray.report import words\n",
}


@pytest.fixture
def checkout(tmp_path):
    for name, text in FILES.items():
        path = tmp_path / "moe_ray" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return tmp_path


def test_imports_are_found_wherever_they_stand(checkout):
    modules = read_modules(checkout)
    assert modules["moe_ray.storage.folder"].imports == {("moe_ray.errors", "import")}
    assert modules["moe_ray.report.page"].imports == {("moe_ray.storage.folder", "function")}
    assert modules["moe_ray.report.words"].imports == {("moe_ray.report.page", "types")}


def test_floors_are_the_longest_chains_and_a_circle_has_one(checkout):
    modules = read_modules(checkout)
    found = floors(children_graph(modules, "moe_ray"))
    assert found == {
        "moe_ray.errors": 1,
        "moe_ray.storage": 2,
        "moe_ray.report": 3,
        "moe_ray.ring_a": 4,
        "moe_ray.ring_b": 4,
    }
    assert circles({name: module.arrows for name, module in modules.items()}) == [("moe_ray.ring_a", "moe_ray.ring_b")]


def test_what_is_too_long_is_named(checkout):
    long = "class Long:\n" + "    x = 1\n" * 299
    (checkout / "moe_ray" / "errors.py").write_text(long)
    told = describe(checkout)
    assert "modules over 280 lines: moe_ray.errors (300)" in told
    assert "classes over 250 lines: moe_ray.errors.Long (300)" in told
    assert "circles: moe_ray.ring_a <-> moe_ray.ring_b" in told


@pytest.mark.slow
def test_the_arrows_of_this_checkout_are_those_that_import_linter_sees():
    graph = grimp.build_graph("moe_ray", cache_dir=None)
    seen = {name: set(graph.find_modules_directly_imported_by(name)) for name in graph.modules}
    assert {name: module.arrows for name, module in read_modules(ROOT).items()} == seen
