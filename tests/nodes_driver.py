"""A cluster of several nodes on this machine, in a process of its own; prints what came of it as JSON.

Arguments: `kill` or `reach`, then the model and the run directory.
"""

import ctypes
import json
import os
import sys
import threading
import time
from contextlib import contextmanager
from pathlib import Path

import ray
from capture_helpers import SlowActor
from ray.cluster_utils import Cluster

from moe_ray.config.capture import CaptureConfig
from moe_ray.config.cluster import ClusterConfig
from moe_ray.config.model import ModelConfig
from moe_ray.errors import InputError
from moe_ray.orchestration.cluster.ray_session import check_reachable, ray_session
from moe_ray.orchestration.jobs.capture import capture
from moe_ray.run_directory import CAPTURE, RunDirectory
from moe_ray.storage.folder import Folder

_CLONE_FS, _CLONE_NEWNS, _MS_REC, _MS_PRIVATE = 0x200, 0x20000, 0x4000, 0x40000


class SlowActorOnANode(SlowActor):
    """Leaves the id of its node beside the attempts."""

    def forward(self, examples, rows):
        Path(self.attempts.path).parent.joinpath(f"node-{ray.get_runtime_context().get_node_id()}").touch()
        return super().forward(examples, rows)


def kill_a_node(model, run):
    """Captures on a head and two nodes, and ends one that is at work, at once."""
    # No place for work on the head, which cannot be ended.
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0})
    nodes = [cluster.add_node(num_cpus=2) for _ in range(2)]
    killed = []
    out = RunDirectory.open(run).sub(CAPTURE)

    def kill_when_at_work():
        while not killed:
            at_work = {path.name.removeprefix("node-") for path in Path(out.path).glob("node-*")}
            chosen = [node for node in nodes if node.node_id in at_work]
            if chosen and len(out.sub("counts").parquet_names()) >= 3:
                cluster.remove_node(chosen[0], allow_graceful=False)
                killed.append(chosen[0].node_id)
            time.sleep(0.05)

    try:
        with ray_session(ClusterConfig(address=cluster.address)):
            cluster.wait_for_nodes()
            threading.Thread(target=kill_when_at_work, daemon=True).start()
            config = CaptureConfig(generate=False, tokens_per_forward=256, num_actors=2)
            notes = capture(
                *(RunDirectory.open(run), ModelConfig(path=model), config),
                actor=SlowActorOnANode,
                seconds_per_part=0.0,
            )
            alive = [node["NodeID"] for node in ray.nodes() if node["Alive"]]
    finally:
        cluster.shutdown()
    return {"killed": killed, "alive": alive, "quarantined": notes["quarantined"]}


def reach_a_folder(model, run):
    """What `check_reachable` says of a folder before and after a node joins that does not see it."""
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1})
    cluster.add_node(num_cpus=1)
    folder = Folder.open(run)
    try:
        with ray_session(ClusterConfig(address=cluster.address)):
            cluster.wait_for_nodes()
            check_reachable(folder)
        with another_folder_seen(run):
            cluster.add_node(num_cpus=1)
        with ray_session(ClusterConfig(address=cluster.address)):
            cluster.wait_for_nodes()
            try:
                check_reachable(folder)
                message = ""
            except InputError as error:
                message = str(error)
            nodes = sum(node["Alive"] for node in ray.nodes())
    finally:
        cluster.shutdown()
    return {"message": message, "nodes": nodes, "left": [path.name for path in Path(run).iterdir()]}


@contextmanager
def another_folder_seen(folder):
    """In this block, for this thread and what it starts, an empty file system lies over the folder."""
    libc = ctypes.CDLL(None, use_errno=True)
    with open("/proc/thread-self/ns/mnt") as before:
        call(libc.unshare, _CLONE_NEWNS)
        try:
            call(libc.mount, b"none", b"/", None, _MS_REC | _MS_PRIVATE, None)
            call(libc.mount, b"none", folder.encode(), b"tmpfs", 0, None)
            yield
        finally:
            # Only a thread that shares its root and working directory with no other may go back.
            call(libc.unshare, _CLONE_FS)
            call(libc.setns, before.fileno(), _CLONE_NEWNS)


def call(function, *arguments):
    """Calls into the C library."""
    if function(*arguments):
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))


if __name__ == "__main__":
    what, *arguments = sys.argv[1:]
    ray.cloudpickle.register_pickle_by_value(sys.modules["capture_helpers"])
    print(json.dumps({"kill": kill_a_node, "reach": reach_a_folder}[what](*arguments)))
