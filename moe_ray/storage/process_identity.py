"""Whether a process that a file names is still the one that wrote it; asked of `/proc`, and not known without it."""

from __future__ import annotations

import os


def system_identity() -> str:
    """What processes have in common that see each other by their ids; empty where it is not known."""
    try:
        with open("/proc/sys/kernel/random/boot_id", encoding="ascii") as file:
            return f"{file.read().strip()} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return ""


def start_of(pid: int) -> int | None:
    """When a process of this system started, in clock ticks since the system did; None = it has ended.

    A process that has ended and that its parent has not asked about yet counts as ended.

    Raises:
        OSError: it is not known, since there is no `/proc`.
    """
    try:
        with open(f"/proc/{pid}/stat", encoding="utf-8", errors="replace") as file:
            # The second field is the program's name in brackets, which may hold blanks and brackets of its own.
            fields = file.read().rpartition(")")[2].split()
    except (FileNotFoundError, ProcessLookupError):
        if not os.path.exists("/proc/self/stat"):
            raise
        return None
    return None if fields[0] in "ZX" else int(fields[19])
