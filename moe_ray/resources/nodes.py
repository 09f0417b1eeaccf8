"""The machines that a run may use, as numbers."""

from __future__ import annotations

import re
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

from moe_ray.threads import usable_cores

GB = 10**9

KNOWN_GPUS = {
    "B200": 180, "H200": 141, "H100": 80, "H20": 96, "GH200": 96, "A100-80G": 80, "A100": 40, "A100-40G": 40, "L40S": 48,
    "L40": 48, "A40": 48, "A6000": 48, "A10G": 24, "A10": 24, "L4": 24, "V100": 16, "T4": 16, "P100": 16,
}  # fmt: skip
"""Memory in GB by the name that Ray has for a kind of GPU; the smaller one where it was sold with two sizes."""

_CGROUP_LIMITS = ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes")


@dataclass(frozen=True, kw_only=True)
class Node:
    """A machine.

    Attributes:
        cpus: logical CPUs that processes may take.
        memory: bytes of it, for all processes.
        gpus: how many.
        gpu_memory: bytes of each; None = not known.
        gpu_name: their kind; empty = not known.
    """

    cpus: float
    memory: int
    gpus: int = 0
    gpu_memory: int | None = None
    gpu_name: str = ""


def this_machine(*, cpus: float | None = None) -> Node:
    """This machine; starts nothing but `nvidia-smi`, where it is there.

    Args:
        cpus: that processes may take; None = its cores.
    """
    gpus, gpu_memory, gpu_name = gpus_here()
    return Node(
        cpus=usable_cores() if cpus is None else cpus,
        memory=memory_here(),
        gpus=gpus,
        gpu_memory=gpu_memory,
        gpu_name=gpu_name,
    )


def memory_here() -> int:
    """Bytes of memory that the processes of this machine, or of this container, may take together."""
    found = re.search(r"^MemTotal: +(\d+) kB$", Path("/proc/meminfo").read_text(encoding="ascii"), re.MULTILINE)
    assert found is not None
    limits = [int(found[1]) * 1024]
    for path in map(Path, _CGROUP_LIMITS):
        text = path.read_text(encoding="ascii").strip() if path.is_file() else "max"
        if text.isdigit():
            limits.append(int(text))
    return min(limits)


def gpus_here() -> tuple[int, int | None, str]:
    """How many NVIDIA GPUs this machine has, the least memory of one in bytes (None = none), and their name."""
    program = shutil.which("nvidia-smi")
    if program is None:
        return 0, None, ""
    command = [program, "--query-gpu=memory.total,name", "--format=csv,noheader,nounits"]
    try:
        answer = subprocess.run(command, capture_output=True, text=True, timeout=20).stdout
    except (OSError, subprocess.TimeoutExpired):
        return 0, None, ""
    return read_gpus(answer)


def read_gpus(answer: str) -> tuple[int, int | None, str]:
    """What `gpus_here` gives, of the lines `MIB, NAME` that `nvidia-smi` answers."""
    found = re.findall(r"^\s*(\d+)\s*,\s*(.+?)\s*$", answer, re.MULTILINE)
    if not found:
        return 0, None, ""
    least, name = min((int(mebibytes), name) for mebibytes, name in found)
    return len(found), least << 20, name.removeprefix("NVIDIA ")
