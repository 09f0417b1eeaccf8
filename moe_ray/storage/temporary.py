"""One folder for all that a command's processes write temporarily, removed whatever becomes of them.

A process that is killed leaves its temporary files behind. Those of one command lie in one folder, which the command
removes at its end; where the command itself was killed, the next one of the same user does. Its name says whose it is, so
that none is taken from a process that lives: `moe-ray-PID-START-SYSTEM`, with START in the system's clock ticks and SYSTEM a
digest of the system's start and the space of process ids.
"""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import stat
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from moe_ray.storage.process_identity import start_of, system_identity

_NAME = re.compile(r"moe-ray-(\d+)-(\d+)-([0-9a-f]{6})")
_LONGEST_PATH = 107 - len("/torch-shm-dir-XXXXXX/manager.sock")
"""Sockets are made in folders for temporary files, and the path of one has at most 107 bytes."""


@contextmanager
def own_temporary_folder() -> Iterator[None]:
    """Inside the context, this process and those that it starts write temporary files into a folder of their own.

    It lies in the folder that was for temporary files before, which `TMPDIR` names. Ray's own folder stays there: what
    `RAY_TMPDIR` is for. Where no folder can be made, everything stays as it was. The nodes of a cluster that is connected to
    inherit nothing of this process, and go on using their own.
    """
    base = _base()
    _remove_ownerless(base)
    if (folder := _made_in(base)) is None:
        yield
        return
    before = {name: os.environ.get(name) for name in ("TMPDIR", "RAY_TMPDIR")}
    default = tempfile.tempdir
    os.environ.setdefault("RAY_TMPDIR", _of_ray())
    os.environ["TMPDIR"] = tempfile.tempdir = str(folder)
    try:
        yield
    finally:
        tempfile.tempdir = default
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value
        # What a process writes that is ending at this moment is left to the next command.
        shutil.rmtree(folder, ignore_errors=True)
        _remove_ownerless(base)


def _base() -> Path | None:
    try:
        return Path(tempfile.gettempdir())
    except OSError:  # no folder is writable, which concerns those alone who want to write
        return None


def _of_ray() -> str:
    """Where Ray puts its folder unless it is told otherwise."""
    return os.environ.get("TMPDIR", "/tmp") if sys.platform.startswith("linux") else "/tmp"


def _made_in(base: Path | None) -> Path | None:
    """This process's folder; None = it cannot be had."""
    system = system_identity()
    if base is None or not system:
        return None
    folder = base / f"moe-ray-{os.getpid()}-{start_of(os.getpid())}-{_digest(system)}"
    if len(os.fsencode(folder)) > _LONGEST_PATH:
        return None
    try:
        folder.mkdir(mode=0o700)
    except FileExistsError:
        # Left by an earlier context of this process; what is somebody else's is not written into.
        return folder if _is_mine(folder) else None
    except OSError:
        return None
    return folder


def _remove_ownerless(base: Path | None) -> None:
    """Removes this user's folders of commands of this system that have ended."""
    system = system_identity()
    if base is None or not system:
        return
    try:
        names = os.listdir(base)
    except OSError:
        return
    for name in names:
        said = _NAME.fullmatch(name)
        if said is None or said[3] != _digest(system) or not _is_mine(base / name):
            continue
        if start_of(int(said[1])) != int(said[2]):
            shutil.rmtree(base / name, ignore_errors=True)


def _is_mine(folder: Path) -> bool:
    """Whether it is a folder, and no link to one, that this user made and nobody else writes into."""
    try:
        found = folder.lstat()
    except OSError:
        return False
    return stat.S_ISDIR(found.st_mode) and found.st_uid == os.geteuid() and not stat.S_IMODE(found.st_mode) & 0o077


def _digest(system: str) -> str:
    return hashlib.sha256(system.encode()).hexdigest()[:6]
