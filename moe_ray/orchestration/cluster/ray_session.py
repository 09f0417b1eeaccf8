"""Connecting to Ray, and what else the driver asks of it: CPUs, results, nodes that see the run directory."""

from __future__ import annotations

import gc
import logging
import os
import socket
import sys
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pyarrow.fs
import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from moe_ray.config.auto import number_of
from moe_ray.config.cluster import ClusterConfig
from moe_ray.errors import InputError, MoeRayError, OutsideFailed
from moe_ray.orchestration.cluster.local_environment import cluster_address, set_local_environment
from moe_ray.orchestration.cluster.raylet_watch import RayletWatch, raylet_watched
from moe_ray.orchestration.cluster.token_file import protect_token
from moe_ray.signals import end_on_sigterm, interrupts_deferred
from moe_ray.storage.folder import Folder
from moe_ray.threads import variables_for_workers

logger = logging.getLogger(__name__)

_ANSWER_SECONDS = 10.0
_NO_RAYLET = (
    "Ray's own process on this machine (raylet) ended, and all model processes with it, as they do where memory runs out or "
    "somebody kills it; what was done is kept, and the same command goes on where this one stopped"
)
_TOO_SLOW = ("timed out during startup", "error message from the dashboard", "Failed to start a dashboard")
"""What Ray says, beside the last lines of a log, of a process of its own that was not up in time."""
_LOG_LEVELS = {
    "ray.data": logging.WARNING,
    "ray.train": logging.WARNING,
    # Warns that the progress bars which moe-ray replaces by its own are off.
    "ray.data._internal.progress": logging.ERROR,
    # Warns that a local Ray is protected by a token, as it should be.
    "ray._private.authentication.authentication_token_setup": logging.ERROR,
}


@contextmanager
def ray_session(config: ClusterConfig, *, dashboard: bool = True) -> Iterator[None]:
    """Connects to Ray for the length of the context.

    A connection that the caller has made is used. Without one, the cluster at the configured address or at `RAY_ADDRESS`
    is connected to. Without an address a local Ray is started, which listens on loopback only and is stopped at the end.

    Args:
        config: which cluster.
        dashboard: a local Ray has one. Ray Train asks its process for the state of its actors, and complains without it.

    Raises:
        InputError: the address does not answer.
        OutsideFailed: work ended with an error after every node of the cluster was lost, whatever that error said.
    """
    set_local_environment(config)
    address = cluster_address(config)
    if ray.is_initialized():
        _tune_data()
        yield
        return
    _quieten()
    if os.environ.get("NO_COLOR") or not (sys.stdout.isatty() and sys.stderr.isatty()):
        # What workers print is shown on one of the two, behind a name in colour.
        os.environ.setdefault("RAY_COLOR_PREFIX", "0")
    try:
        if address:
            logger.info("connecting to Ray at %s", address)
            _require_answer(address)
            # The nodes' processes inherit nothing of this one.
            variables = variables_for_workers()
            environment = {"env_vars": variables} if variables else None
            ray.init(address=address, runtime_env=environment, log_to_driver=True, logging_level="warning")
        else:
            num_cpus = number_of(config.num_cpus, undecided=4)
            logger.info("starting a local Ray with %d logical CPUs", num_cpus)
            _start_local(num_cpus=num_cpus, include_dashboard=dashboard)
    except ConnectionError as error:
        raise InputError(f"no Ray cluster answers at {address!r}: {error}; check cluster.address") from error
    end_on_sigterm()
    _tune_data()
    raylet = RayletWatch()
    try:
        with raylet_watched(raylet):
            yield
    except KeyboardInterrupt as error:
        if not raylet.has_ended:
            raise
        # The interrupt was not a request to end this process, which may go on, as one of a notebook does.
        end_on_sigterm()
        raise OutsideFailed(_NO_RAYLET) from error
    except Exception as error:
        if isinstance(error, OutsideFailed) or has_nodes():
            raise
        # Actors that cannot be started anywhere look like ones that end for want of memory.
        raise OutsideFailed(_NO_RAYLET) from error
    finally:
        ray.shutdown()


def has_nodes() -> bool:
    """Whether any node is there to work on; Ray itself may be gone with the last one."""
    try:
        return any(node["Alive"] for node in ray.nodes())
    except Exception:  # Ray has no type of its own for a service that is gone
        return False


def _require_answer(address: str) -> None:
    """Refuses an address where nobody listens; Ray itself would try for half a minute and say so in twenty lines.

    Raises:
        InputError: there is no connection within ten seconds.
    """
    host, colon, port = address.rpartition("://")[2].rpartition(":")
    if not colon or not port.isdigit():
        return  # "auto", and names that only Ray knows
    try:
        with socket.create_connection((host.strip("[]"), int(port)), timeout=_ANSWER_SECONDS):
            pass
    except OSError as error:
        raise InputError(
            f"no Ray cluster answers at {address!r}: {error}; check cluster.address or RAY_ADDRESS, and that the cluster is "
            "up"
        ) from error


def _start_local(**options: Any) -> None:
    """Starts a Ray of this machine alone; twice, if its processes need longer than Ray waits, as on a crowded machine."""
    protect_token()
    for attempts_left in (1, 0):
        try:
            # A start that was broken off may end this process with a segmentation fault when that ends.
            with interrupts_deferred():
                ray.init(address="local", dashboard_host="127.0.0.1", logging_level="warning", **options)
            return
        except KeyboardInterrupt:
            ray.shutdown()
            raise
        except Exception as error:  # Ray has no type of its own for it
            if not any(said in str(error) for said in _TOO_SLOW):
                raise
            if not attempts_left:
                raise OutsideFailed(
                    "Ray did not start on this machine, twice, within the time that it gives itself; run the same command "
                    "again when the machine is less busy"
                ) from error
            logger.warning("Ray did not start within the time that it gives itself; trying once more")
            ray.shutdown()


def result_of(reference: Any) -> Any:
    """What a remote call returned.

    Raises:
        MoeRayError: the call raised it; it comes without Ray's report of where.
    """
    try:
        return ray.get(reference)
    except ray.exceptions.RayTaskError as error:
        if isinstance(error.cause, MoeRayError):
            raise error.cause from None
        raise


def is_local() -> bool:
    """Whether this is a Ray of this machine alone; a cluster may still add nodes."""
    address: str = ray.get_runtime_context().gcs_address
    return address.startswith("127.0.0.1")


def require_cpus(wanted: int, what: str) -> None:
    """Refuses work that would wait for CPUs for ever.

    Raises:
        InputError: a Ray on this machine alone has fewer CPUs.
    """
    cpus = int(all_cpus())
    if cpus < wanted and is_local():
        raise InputError(
            f"{what} needs {wanted} logical CPUs, got {cpus}; raise cluster.num_cpus (it may exceed the cores) or use "
            "fewer actors"
        )


def require_gpus(wanted: float, what: str) -> None:
    """Refuses work that would wait for GPUs for ever.

    Raises:
        InputError: a Ray on this machine alone has fewer GPUs.
    """
    gpus = float(ray.cluster_resources().get("GPU", 0.0))
    if gpus < wanted and is_local():
        raise InputError(
            f"{what} needs {wanted:g} GPUs, got {gpus:g} on this machine; set its gpus_per_… setting to 0, use fewer "
            "processes, or name a cluster with cluster.address"
        )


def free_resources(name: str) -> float:
    """How many `CPU` or `GPU` nobody holds now."""
    return float(ray.available_resources().get(name, 0.0))


def all_cpus() -> float:
    """How many CPUs the cluster has."""
    return float(ray.cluster_resources().get("CPU", 0.0))


def has_room_to_grow(cpus: float, gpus: float) -> bool:
    """Whether a process with these resources can be started: there is room, or a cluster may add a node for it."""
    return not is_local() or (free_resources("CPU") >= cpus and free_resources("GPU") >= gpus)


@contextmanager
def resources_released(what: str, *, timeout_seconds: float = 60.0) -> Iterator[None]:
    """Waits at the end until the actors that were started meanwhile have given back their GPUs and CPUs.

    Ray ends actors some time after their work is done, and the next stage would find no free GPU until then. After an error
    no stage comes next, and nothing is waited for.
    """
    before = ray.available_resources()
    yield
    wait_until_free(before, what, timeout_seconds=timeout_seconds)


def wait_until_free(before: dict[str, float], what: str, *, timeout_seconds: float = 60.0) -> None:
    """Waits until as many CPUs and GPUs are free as before."""
    gc.collect()
    deadline = time.monotonic() + timeout_seconds
    while missing := _missing(before, ray.available_resources()):
        if not has_nodes():  # nobody is left to give anything back
            return
        if time.monotonic() > deadline:
            logger.warning("%s: %s not given back after %.0f s", what, ", ".join(missing), timeout_seconds)
            break
        time.sleep(0.05)


def _missing(before: dict[str, float], now: dict[str, float]) -> list[str]:
    return [f"{before[name] - now.get(name, 0):g} {name}" for name in ("CPU", "GPU") if _less(now, before, name)]


def _less(now: dict[str, float], before: dict[str, float], name: str) -> bool:
    return now.get(name, 0.0) < before.get(name, 0.0) - 1e-6


def check_reachable(folder: Folder) -> None:
    """Writes a file and has every node of the cluster read it and answer with another.

    Raises:
        InputError: a node does not see what this process wrote, or this process does not see what a node wrote.
    """
    nodes = [node for node in ray.nodes() if node["Alive"]]
    if len(nodes) == 1 and "file" in folder.fs.protocol:
        return
    probe = f"probe-{uuid.uuid4().hex}"
    folder.write_bytes(probe, probe.encode())
    answer = ray.remote(num_cpus=0, max_retries=0)(_answer_probe)
    names = [f"{probe}-{position}" for position in range(len(nodes))]
    answers = [
        answer.options(scheduling_strategy=NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)).remote(
            folder.url, probe, name
        )
        for node, name in zip(nodes, names, strict=True)
    ]
    try:
        reads = ray.get(answers, timeout=120)
        blind = [
            str(node["NodeManagerHostname"])
            for node, name, read in zip(nodes, names, reads, strict=True)
            if not (read and folder.exists(name))
        ]
    finally:
        for name in [probe, *names]:
            folder.remove(name)
    if blind:
        raise InputError(
            f"run_dir {folder.url} cannot be reached from {len(blind)} of {len(nodes)} nodes ({', '.join(blind[:5])}), "
            "expected a place that every node sees; set run_dir to a folder on a shared file system or to an object store "
            "such as s3://BUCKET/PREFIX"
        )


def _answer_probe(url: str, probe: str, answer: str) -> bool:
    """Whether this node reads what the driver wrote; answers with a file of its own."""
    try:
        folder = Folder.open(url)
        if folder.read_bytes(probe) != probe.encode():
            return False
        folder.write_bytes(answer, b"")
    except (OSError, InputError):
        return False
    return True


def _tune_data() -> None:
    import ray.data  # only drivers need it; an actor that comes here for `result_of` is spared its second

    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    # The newer reader starts actors only to read the footers of files.
    context.use_datasource_v2 = False
    # An error that an actor or task raises comes as it was raised, not wrapped in Ray Data's report of where.
    context.raise_original_map_exception = True
    # Ray Data sets its loggers' levels when it is imported.
    _quieten()


def _quieten() -> None:
    for name, level in _LOG_LEVELS.items():
        logging.getLogger(name).setLevel(level)


def arrow_filesystem(folder: Folder) -> Any:
    """The folder's file system as Ray takes it; None = local."""
    if "file" in folder.fs.protocol:
        return None
    return pyarrow.fs.PyFileSystem(pyarrow.fs.FSSpecHandler(folder.fs))
