import pytest
import yaml
from paths import ROOT

pytestmark = pytest.mark.needs_ray


@pytest.fixture
def cluster():
    return yaml.safe_load((ROOT / "cluster.yaml").read_text())


@pytest.mark.filterwarnings("default")
def test_rays_own_schema_accepts_the_cluster_file(cluster):
    from ray.autoscaler._private.util import prepare_config, validate_config

    prepared = prepare_config(cluster)
    validate_config(prepared)  # raises where it finds a fault, as the next test shows
    assert set(prepared["available_node_types"]) == set(cluster["available_node_types"])


@pytest.mark.filterwarnings("default")
def test_the_schema_check_would_notice_an_unknown_key(cluster):
    from ray.autoscaler._private.util import prepare_config, validate_config

    with pytest.raises(Exception, match="max_wrokers"):
        validate_config(prepare_config(cluster | {"max_wrokers": 3}))


def test_the_head_takes_no_work_and_workers_with_and_without_gpus_scale_from_none(cluster):
    types = cluster["available_node_types"]
    assert types[cluster["head_node_type"]]["resources"] == {"CPU": 0}
    workers = {name: kind for name, kind in types.items() if name != cluster["head_node_type"]}
    assert all(kind["min_workers"] == 0 < kind["max_workers"] for kind in workers.values())
    gpus = {name: kind["resources"].get("GPU", 0) for name, kind in workers.items()}
    assert gpus == {"cpu_worker": 0, "gpu_worker": 1}
    assert cluster["max_workers"] == sum(kind["max_workers"] for kind in workers.values())


@pytest.mark.parametrize("name", [".git", ".venv", "/runs", "/data", "/models"])
def test_what_need_not_travel_is_not_shipped(cluster, name):
    assert name in cluster["rsync_exclude"]
    ignored = (ROOT / ".rayignore").read_text().splitlines()
    assert f"{name}/".lstrip("/") in [line.lstrip("/") for line in ignored]
