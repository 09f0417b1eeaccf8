import runpy

import pytest
from paths import ROOT

pytestmark = [pytest.mark.slow, pytest.mark.needs_ray, pytest.mark.filterwarnings("default")]


def test_both_ways_find_the_same_and_each_has_two_rows(ray_cluster, tmp_path):
    script = runpy.run_path(str(ROOT / "benchmarks" / "groupby.py"), run_name="groupby")
    rows = script["compare"](2, str(tmp_path))
    assert rows["way"].tolist() == ["by parts", "by parts", "groupby", "groupby"]
    assert (rows["seconds"] > 0).all()
