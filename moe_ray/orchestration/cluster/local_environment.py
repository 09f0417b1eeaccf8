"""The environment of a local Ray, which must be set before ray is imported.

So this module imports no ray, and `launch` calls it before it imports anything that does.

With Ray's defaults a small job takes longer to set up than to do: workers run at nice 15, and idle workers are stopped and
started again.
"""

from __future__ import annotations

import os

from moe_ray.config.cluster import ClusterConfig
from moe_ray.threads import wait_passively

_LOCAL_ENVIRONMENT = {
    # With it Ray takes 127.0.0.1 for this node's address, and its servers listen there only. Read when ray is imported.
    "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",
    "RAY_worker_niceness": "0",
    "RAY_num_workers_soft_limit": "8",
    "RAY_USAGE_STATS_ENABLED": "0",
    # A node ends itself where its own agent is not there by then, which on a crowded machine half a minute is too short for.
    "RAY_agent_register_timeout_ms": "120000",
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.2",
    "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0",
    "RAY_TRAIN_ENABLE_PRINT_PATCH": "0",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    "TOKENIZERS_PARALLELISM": "false",
}


def cluster_address(config: ClusterConfig) -> str:
    """The address of a running cluster, as configured or else in `RAY_ADDRESS`; empty = a local Ray is to be started."""
    return config.address or os.environ.get("RAY_ADDRESS", "")


def set_local_environment(config: ClusterConfig) -> None:
    """Sets what this process's threads and a local Ray read and is not set yet; a cluster has its own environment."""
    wait_passively()
    if not cluster_address(config):
        for name, value in _LOCAL_ENVIRONMENT.items():
            os.environ.setdefault(name, value)
