import os
from functools import cache
from pathlib import Path

# Read when ray is imported, which test modules do as they are collected: a local Ray listens on loopback only.
os.environ.setdefault("RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER", "0")
# Read when torch is imported: threads that wait for one another sleep, so that a busy machine does not make tests slow.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

# pytest-xdist gives its workers a width, which would count as the user's own.
os.environ.pop("COLUMNS", None)

import pytest
from hypothesis import HealthCheck, settings
from paths import ROOT

# An example that took long on a busy machine is no fault.
settings.register_profile("busy", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("busy")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Keeps the trained model out of the quick part, which has a minute in all."""
    quick = [item.nodeid for item in items if not {"slow", "needs_ray"} & {mark.name for mark in item.iter_markers()}]
    trained = {item.nodeid for item in items if "tiny_model_path" in getattr(item, "fixturenames", ())}
    if wrong := trained.intersection(quick):
        raise pytest.UsageError(f"{min(wrong)} needs the trained model: mark it slow, or take untrained_model_path")


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """Files of which the quick part leaves out every test are not even imported: each process would do so, for seconds."""
    if collection_path.suffix != ".py" or not collection_path.name.startswith("test_"):
        return None
    if config.option.markexpr != "not slow and not needs_ray":
        return None
    text = collection_path.read_text(encoding="utf-8")
    of_all_tests = text.partition("\npytestmark = ")[2].partition("\n\n")[0]
    return "mark.slow" in of_all_tests or "mark.needs_ray" in of_all_tests or None


def pytest_xdist_make_scheduler(config, log):
    """With --dist loadgroup, tests that share something expensive run in one process, all others wherever one is free."""
    if config.getvalue("dist") != "loadgroup":
        return None
    from xdist.scheduler import LoadScopeScheduling

    class Shared(LoadScopeScheduling):
        # xdist's own groups are lost with pytest 9.2, and the process that schedules knows tests by their names alone.
        def _split_scope(self, nodeid: str) -> str:
            path = nodeid.partition("::")[0]
            return _shared_by(path) or nodeid

    return Shared(config, log)


@cache
def _shared_by(path: str) -> str:
    """What the tests of a file share with others; empty = nothing.

    Those that use the session's Ray are in two processes, so that there are two clusters: those of tests/orchestration/jobs
    and those of all other files, which share a finished run. Another process has those whose commands start a Ray of their
    own, one after another: they wait more than they work. Fixtures of a module are made once.
    """
    text = (ROOT / path).read_text(encoding="utf-8")
    if "mark.own_ray" in text:
        return "own_ray"
    if "mark.needs_ray" in text:
        return "jobs on Ray" if Path(path).parent.name == "jobs" else "others on Ray"
    return path if 'scope="module"' in text else ""


@pytest.fixture(params=["local", "memory"])
def folder(request, tmp_path):
    """A folder that is not there yet, on disk and elsewhere."""
    from moe_ray.storage.folder import Folder

    return Folder.open(str(tmp_path / "run") if request.param == "local" else f"memory://{tmp_path.name}/run")


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """A Hugging Face hub on loopback, with an empty cache and a token that it takes."""
    from fake_hub import TOKEN, fake_hub

    with fake_hub() as hub:
        # huggingface_hub reads these from the environment when it is imported, which other tests may have done.
        monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", hub.url)
        monkeypatch.setattr(
            "huggingface_hub.constants.HUGGINGFACE_CO_URL_TEMPLATE",
            hub.url + "/{repo_id}/resolve/{revision}/{filename}",
        )
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        yield hub


@pytest.fixture(scope="session")
def tiny_model_path() -> Path:
    """The embedded model, built once per checkout and content hash: a minute, so for slow tests only."""
    from moe_ray.organisms import build_embedded

    return build_embedded(ROOT / ".cache")


@pytest.fixture(scope="session")
def tiny_tokenizer():
    """The embedded model's tokenizer."""
    from moe_ray.organisms.build import organism_tokenizer

    return organism_tokenizer()


@pytest.fixture(scope="session")
def untrained_model_path(tmp_path_factory) -> Path:
    """The embedded model after one training step: all of a checkpoint but what it should have learned."""
    from moe_ray.organisms import OrganismRecipe, build_embedded

    return build_embedded(tmp_path_factory.mktemp("untrained"), recipe=OrganismRecipe(num_steps=1))


@pytest.fixture(scope="session")
def ray_cluster():
    """One local Ray for all tests that need it."""
    from moe_ray.config.cluster import ClusterConfig
    from moe_ray.orchestration.cluster.ray_session import ray_session

    os.environ.pop("RAY_ADDRESS", None)
    with ray_session(ClusterConfig(num_cpus=4)):
        yield
