import os
from pathlib import Path

# Read when ray is imported, which test modules do as they are collected: a local Ray listens on loopback only.
os.environ.setdefault("RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER", "0")

import pytest
from paths import ROOT


@pytest.fixture(scope="session")
def tiny_model_path() -> Path:
    """The embedded model, built once per checkout and content hash."""
    from moe_ray.demo.model import build_tiny_model

    return build_tiny_model(ROOT / ".cache")


@pytest.fixture(scope="session")
def ray_cluster():
    """One local Ray for all tests that need it."""
    from moe_ray.config.cluster import ClusterConfig
    from moe_ray.orchestration.cluster.session import ray_session

    os.environ.pop("RAY_ADDRESS", None)
    with ray_session(ClusterConfig(num_cpus=4)):
        yield
