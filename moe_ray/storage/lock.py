"""One driver at a time works on a run directory; a second one is told so."""

from __future__ import annotations

import fcntl
import json
import logging
import os
import platform
import threading
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from fsspec.implementations.local import LocalFileSystem

from moe_ray.errors import InputError
from moe_ray.storage.folder import Folder
from moe_ray.storage.process_identity import system_identity

logger = logging.getLogger(__name__)

LOCK = ".lock"
_BEAT_SECONDS, _DEAD_SECONDS = 20.0, 90.0
"""How often a driver says in an object store that it is there, and after how long without a word it is taken for dead."""


@contextmanager
def locked(folder: Folder) -> Iterator[None]:
    """Holds the folder for this process.

    On a local or shared disk the system holds the lock, and gives it back when the process ends in whatever way. In an
    object store a file says who holds it and since when; it is renewed, and is free again when nobody has renewed it for
    90 s, or at once where the holder was a process of this machine that is gone. There two drivers that begin in the same
    moment may both go on.

    Raises:
        InputError: another process holds it.
    """
    with _held_by_the_system(folder) if isinstance(folder.fs, LocalFileSystem) else _held_by_a_file(folder):
        yield


def holder(folder: Folder) -> dict[str, Any] | None:
    """Who holds the folder, as `host` and `pid`; None = nobody, or nobody who could be told. Takes nothing."""
    if not folder.exists(LOCK):
        return None
    said = _decoded(folder.read_bytes(LOCK).decode(errors="replace"))
    if not isinstance(said, dict) or not {"host", "pid"} <= said.keys():
        return None
    if not isinstance(folder.fs, LocalFileSystem):
        return said if time.time() - float(said.get("time", 0)) < _DEAD_SECONDS else None
    with open(folder.file(LOCK), encoding="utf-8") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return said
        except OSError:
            return None
    return None


def _about_this_process() -> dict[str, Any]:
    return {"host": platform.node(), "pid": os.getpid(), "key": uuid.uuid4().hex, "system": system_identity()}


def _has_gone(holder: dict[str, Any]) -> bool:
    """Whether the holder is known to have ended, since it was a process of this system."""
    pid = holder.get("pid")
    if not holder.get("system") or holder["system"] != system_identity() or type(pid) is not int or pid <= 0:
        return False
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return True
    except OSError:
        return False
    return False


def _refusal(folder: Folder, holder: Any) -> InputError:
    known = isinstance(holder, dict) and {"host", "pid"} <= holder.keys()
    who = f"process {holder['pid']} on {holder['host']}" if known else "another process"
    return InputError(f"{who} is at work in {folder.url}; wait until it has ended, or give another run_dir")


@contextmanager
def _held_by_the_system(folder: Folder) -> Iterator[None]:
    # Opened for appending: whoever comes second must not empty what the first one says of itself.
    try:
        file = open(folder.file(LOCK), "a+", encoding="utf-8")  # noqa: SIM115 – its opening alone may fail in this way
    except OSError as error:
        raise InputError(f"{folder.url} cannot be written to: {error.strerror}; give a writable run_dir") from error
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            file.seek(0)
            raise _refusal(folder, _decoded(file.read())) from error
        except OSError as error:
            # Some shared file systems know no locks.
            logger.warning("%s cannot be locked (%s); see to it that no other process works there", folder.url, error)
        file.truncate(0)
        json.dump(_about_this_process(), file)
        file.flush()
        try:
            yield
        finally:
            # Removed while it is held, so that nobody's lock is taken away.
            folder.remove(LOCK)


@contextmanager
def _held_by_a_file(folder: Folder) -> Iterator[None]:
    about = _about_this_process()

    def renew() -> None:
        folder.write_json(LOCK, {**about, "time": time.time()})

    holder = _decoded(folder.read_bytes(LOCK).decode(errors="replace")) if folder.exists(LOCK) else None
    if isinstance(holder, dict) and time.time() - _beat_of(holder) < _DEAD_SECONDS and not _has_gone(holder):
        raise _refusal(folder, holder)
    renew()
    ended = threading.Event()

    def beat() -> None:
        while not ended.wait(_BEAT_SECONDS):
            try:
                renew()
            except Exception as error:  # a storage's library raises what it likes, and the next beat may come through
                logger.warning("the lock of %s could not be renewed: %s", folder.url, error)

    beating = threading.Thread(target=beat, name="run directory lock", daemon=True)
    beating.start()
    try:
        yield
    finally:
        ended.set()
        beating.join()
        folder.remove(LOCK)


def _beat_of(holder: dict[str, Any]) -> float:
    when = holder.get("time")
    return float(when) if isinstance(when, (int, float)) else 0.0


def _decoded(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        return None
